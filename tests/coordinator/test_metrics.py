"""Counts of one process, the totals in a real ledger, and the page that Prometheus reads."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from aggregator.admission import CHECKS
from coordinator import ledger_counts, metrics
from coordinator.ledger import Ledger
from coordinator.metrics import Tally, cell_name, page, parse_cell
from coordinator.reporter import Reporter
from rankup.errors import BusyError, UnreachableError
from rankup.settings import LedgerSettings

if TYPE_CHECKING:
    from conftest import ValkeyServer

ALL = (*metrics.COUNTED, *metrics.READ)


def on_ledger(settings: LedgerSettings, act: Callable[[Ledger], Awaitable[None]]) -> None:
    async def run() -> None:
        ledger = await Ledger.connect(settings)
        try:
            await act(ledger)
        finally:
            await ledger.close()

    asyncio.run(run())


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_names_follow_the_conventions_of_prometheus() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL)
    for metric in ALL:
        assert metric.name.startswith("rankup_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert ("_seconds" in metric.name) or metric.kind != "histogram"
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert not {"worker", "worker_id", "token", "path"} & set(metric.labels)


def test_every_check_of_admission_is_a_class_of_verdicts() -> None:
    assert {check.name for check in CHECKS} <= metrics.REASONS


def test_what_was_counted_comes_out_of_the_page() -> None:
    tally = Tally()
    tally.add(metrics.REQUESTS, "/v1/leases", "POST", "2xx")
    tally.add(metrics.REQUESTS, "/v1/leases", "POST", "2xx")
    tally.add(metrics.SENT_BYTES, "/v1/leases", amount=120)
    for seconds in (0.005, 0.02, 7.0, 1e6):
        tally.observe(metrics.REQUEST_SECONDS, "/v1/leases", "POST", value=seconds)
    readings = [metrics.Reading(metrics.MODEL_VERSION, ("tiny",), 3), metrics.Reading(metrics.UNFINISHED, (), 2)]
    found = samples(page(tally.take(), readings))
    where = (("method", "POST"), ("route", "/v1/leases"))
    assert found["rankup_http_requests_total", (*where, ("status", "2xx"))] == 2
    assert found["rankup_http_sent_bytes_total", (("route", "/v1/leases"),)] == 120
    name = "rankup_http_request_duration_seconds"
    for bound, count in {"0.005": 1, "0.01": 1, "0.025": 2, "5.0": 2, "15.0": 3, "60.0": 3, "+Inf": 4}.items():
        assert found[f"{name}_bucket", (("le", bound), *where)] == count
    assert found[f"{name}_count", where] == 4
    assert found[f"{name}_sum", where] == pytest.approx(1e6 + 7.025)
    assert found["rankup_model_latest_version", (("model", "tiny"),)] == 3
    assert found["rankup_unfinished_rounds", ()] == 2
    assert tally.take() == {}


@given(st.lists(st.floats(0, 1e9), max_size=40))
def test_buckets_are_cumulative_and_end_with_the_count(values: list[float]) -> None:
    tally = Tally()
    for value in values:
        tally.observe(metrics.STAGE_SECONDS, "fold", value=value)
    found = samples(page(tally.take(), []))
    name = "rankup_stage_duration_seconds"
    buckets = {
        float(dict(labels)["le"]): value for (sample, labels), value in found.items() if sample == f"{name}_bucket"
    }
    assert buckets == {
        bound: sum(value <= bound for value in values) for bound in (*metrics.STAGE_SECONDS.bounds, math.inf) if values
    }


@pytest.mark.parametrize(
    "name", ["", "[]", "{", "[1,2]", '["rankup_gone_total"]', '["rankup_http_requests_total","/x"]', '"x"', "null"]
)
def test_cells_that_this_version_does_not_know_are_left_out(name: str) -> None:
    assert parse_cell(name) is None


def test_names_of_cells_are_read_back() -> None:
    cell = ("rankup_http_requests_total", '/v1/"ö"', "GET", "2xx")
    assert parse_cell(cell_name(cell)) == cell


def test_two_processes_add_up_and_a_report_that_is_sent_twice_counts_once(valkey: ValkeyServer) -> None:
    cell = ("rankup_http_received_bytes_total", "/v1/leases")

    async def act(ledger: Ledger) -> None:
        for process, number, amount in [("a", 1, 1.5), ("a", 1, 1.5), ("b", 1, 10.0), ("a", 2, 100.0), ("a", 2, 100.0)]:
            await ledger_counts.report(ledger, process, number, {cell: amount}, role="gateway", now=7.0)
        assert await ledger_counts.totals(ledger) == ({cell: 111.5}, {"gateway": 7.0})
        valkey.client().flushall()
        await ledger_counts.report(ledger, "a", 3, {cell: 4.0}, role="keeper", now=8.0)
        assert await ledger_counts.totals(ledger) == ({cell: 4.0}, {"keeper": 8.0})

    on_ledger(valkey.ledger_settings, act)


def test_a_report_whose_answer_was_lost_is_neither_lost_nor_added_twice(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally()
    real = ledger_counts.report
    faults = ["before", "after", "after", "none"]

    async def flaky(*args: object, **kwargs: object) -> None:
        fault = faults.pop(0) if faults else "none"
        if fault == "before":
            raise BusyError("not now")
        await real(*args, **kwargs)  # type: ignore[arg-type]
        if fault == "after":
            raise UnreachableError("the answer was lost")

    monkeypatch.setattr(ledger_counts, "report", flaky)

    async def act(ledger: Ledger) -> None:
        async def connect() -> Ledger:
            return ledger

        reporter = Reporter(tally, connect, role="gateway", clock=lambda: 1.0)
        for _ in range(6):
            tally.add(metrics.RECEIVED_BYTES, "/x")
            try:
                await reporter.report()
            except (BusyError, UnreachableError):
                continue
        await reporter.report()
        cells, _ = await ledger_counts.totals(ledger)
        assert cells == {("rankup_http_received_bytes_total", "/x"): 6.0}

    on_ledger(valkey.ledger_settings, act)
