"""What is measured: the list of all metrics, one process's counts of them, and the page that Prometheus reads.

Gateway replicas and the keeper are different processes, and a scrape through Ray Serve reaches any one replica. So a
process keeps no totals: it counts what happened since it last told the ledger (`Tally`), the ledger adds up
(`ledger_counts`), and whichever replica is scraped shows those totals (`page`). Two replicas therefore show the same
numbers and nothing is counted twice; a process that is killed takes a few seconds of counts with it; a ledger that lost
its data starts from zero, which Prometheus takes for a restart. Gauges are no totals: they are read from the ledger and
from object storage when somebody scrapes (`gauges`). Ray's own metrics are another matter: Ray exports them without a
token, on a port of its own, so ours do not go there.

What always holds: names and labels are those declared here and nothing else; every label has a bounded set of values
(route templates, methods, classes of status, codes of errors, names of checks; models and rounds only as gauges, and
only those of the present). No identity of a volunteer is a label.

This is the only module that imports prometheus_client. No I/O here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rankup.errors import RankupError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
LONG_SECONDS: Final = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0)
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER: Final = "other"
UNMATCHED: Final = "unmatched"
"""The route of a request for which there is no route."""
REASONS: Final = frozenset(
    {
        *("accepted", "upload", "size", "round", "work", "signature", "duplicate", "digest", "structure", "norm"),
        *("cancellation", "audit"),
    }
)
"""Classes of verdicts: the check that failed; "upload": the bytes were not there to be checked."""

Cell = tuple[str, ...]
"""Name of a metric, then its labels; of a histogram also the cell: the upper bound of a bucket, or "sum"."""


@dataclass(frozen=True)
class Metric:
    """One metric as Prometheus knows it. Units stand in the name; counters end in `_total`."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    documentation: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without infinity."""


@dataclass(frozen=True)
class Reading:
    """The value of a gauge at one moment."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


REQUESTS = Metric(
    "rankup_http_requests_total",
    "counter",
    "Requests that were answered, by route template, method and class of status; closed: the client went away.",
    ("route", "method", "status"),
)
REQUEST_SECONDS = Metric(
    "rankup_http_request_duration_seconds",
    "histogram",
    "From the first byte of a request to the last byte of its answer.",
    ("route", "method"),
    SECONDS,
)
REFUSALS = Metric(
    "rankup_http_refusals_total",
    "counter",
    "Requests that were refused, by route template and the code of the problem document.",
    ("route", "code"),
)
RECEIVED_BYTES = Metric("rankup_http_received_bytes_total", "counter", "Bytes of request bodies.", ("route",))
SENT_BYTES = Metric("rankup_http_sent_bytes_total", "counter", "Bytes of answers, without their headers.", ("route",))
VERDICTS = Metric(
    "rankup_admission_verdicts_total",
    "counter",
    "Verdicts on submissions; reason: accepted, or the check that failed. One that is reached again after a crash "
    "counts again.",
    ("verdict", "reason"),
)
STAGE_SECONDS = Metric(
    "rankup_stage_duration_seconds",
    "histogram",
    "Time that one stage of a round took: admit (one submission), fold, evaluate, publish.",
    ("stage",),
    LONG_SECONDS,
)
STAGE_FAILURES = Metric(
    "rankup_stage_failures_total", "counter", "Stages that failed and will be tried again.", ("stage", "code")
)
ENROLMENTS = Metric(
    "rankup_enrolments_total",
    "counter",
    "Enrolments that were accepted, by standing; again: a worker that was known got a new token.",
    ("standing",),
)
RATE_LIMITED = Metric(
    "rankup_rate_limited_total",
    "counter",
    "Calls above a rate limit, by kind: enrol, claim, heartbeat, delivery, request, refusal.",
    ("kind",),
)

REPORTED = Metric(
    "rankup_last_report_timestamp_seconds",
    "gauge",
    "When a process of this role last added its counts to the ledger.",
    ("role",),
)
ROUND_LEASES = Metric(
    "rankup_round_leases",
    "gauge",
    "Leases of the rounds that have not ended, by state: granted, submitted, accepted, rejected.",
    ("model", "round", "state"),
)
ROUND_SHARDS = Metric(
    "rankup_round_shards",
    "gauge",
    "Shards of the rounds that have not ended, by state: free, held, accepted.",
    ("model", "round", "state"),
)
ROUND_QUORUM = Metric(
    "rankup_round_quorum", "gauge", "Accepted contributions that close the round.", ("model", "round")
)
ROUND_DEADLINE = Metric(
    "rankup_round_deadline_timestamp_seconds", "gauge", "When the round closes without its quorum.", ("model", "round")
)
ROUND_STATE = Metric(
    "rankup_round_state", "gauge", "1 for the state that the round is in.", ("model", "round", "state")
)
ROUND_FAILURES = Metric(
    "rankup_round_failures", "gauge", "How often the round's present stage has failed in a row.", ("model", "round")
)
OLDEST_PENDING = Metric(
    "rankup_oldest_pending_submission_age_seconds",
    "gauge",
    "Age of the oldest submission without a verdict; 0 where there is none.",
)
OLDEST_ROUND = Metric(
    "rankup_oldest_unfinished_round_age_seconds",
    "gauge",
    "Time since the oldest round that has not ended was opened; 0 where there is none.",
)
UNFINISHED = Metric("rankup_unfinished_rounds", "gauge", "Rounds that the keeper still has work with.")
MODEL_VERSION = Metric("rankup_model_latest_version", "gauge", "Number of the latest version.", ("model",))
MODEL_UPDATED = Metric(
    "rankup_model_updated_timestamp_seconds", "gauge", "When the pointer of the model last moved.", ("model",)
)
STORE_UP = Metric("rankup_object_storage_up", "gauge", "1 where object storage answered this scrape, else 0.")

COUNTED: Final[tuple[Metric, ...]] = (
    REQUESTS,
    REQUEST_SECONDS,
    REFUSALS,
    RECEIVED_BYTES,
    SENT_BYTES,
    VERDICTS,
    STAGE_SECONDS,
    STAGE_FAILURES,
    ENROLMENTS,
    RATE_LIMITED,
)
READ: Final[tuple[Metric, ...]] = (
    REPORTED,
    ROUND_LEASES,
    ROUND_SHARDS,
    ROUND_QUORUM,
    ROUND_DEADLINE,
    ROUND_STATE,
    ROUND_FAILURES,
    OLDEST_PENDING,
    OLDEST_ROUND,
    UNFINISHED,
    MODEL_VERSION,
    MODEL_UPDATED,
    STORE_UP,
)


class Tally:
    """What this process counted since it was last taken. For one event loop: it has no lock."""

    def __init__(self) -> None:
        self._cells: dict[Cell, float] = {}

    def add(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter; one label for each name, in order."""
        self._add((metric.name, *labels), amount)

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Put a value into a histogram."""
        bound = next((bound for bound in metric.bounds if value <= bound), math.inf)
        self._add((metric.name, *labels, _le(bound)), 1.0)
        self._add((metric.name, *labels, "sum"), value)

    def take(self) -> dict[Cell, float]:
        """Everything counted since the last call; the tally is empty afterwards."""
        cells, self._cells = self._cells, {}
        return cells

    def _add(self, cell: Cell, amount: float) -> None:
        self._cells[cell] = self._cells.get(cell, 0.0) + amount


def _le(bound: float) -> str:
    return "+Inf" if math.isinf(bound) else repr(bound)


def cell_name(cell: Cell) -> str:
    """The name of a cell in the ledger."""
    return json.dumps(cell, separators=(",", ":"), ensure_ascii=False)


def parse_cell(name: str) -> Cell | None:
    """The cell of that name; None for one that this version does not know."""
    try:
        found = json.loads(name)
    except ValueError:
        return None
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        return None
    cell = tuple(found)
    metric = _COUNTED_BY_NAME.get(cell[0]) if cell else None
    if metric is None or len(cell) != 1 + len(metric.labels) + (metric.kind == "histogram"):
        return None
    return cell


_COUNTED_BY_NAME: Final = {metric.name: metric for metric in COUNTED}


def status_class(status: int | None) -> str:
    """2xx … 5xx; "closed" for a request that got no answer, because its client had gone."""
    return f"{status // 100}xx" if status is not None and 100 <= status < 600 else "closed"


def error_code(code: str) -> str:
    """The code of an error of the tree, or "other"."""
    return code if code in _codes() else OTHER


def _codes() -> set[str]:
    def walk(kind: type[RankupError]) -> Iterator[str]:
        yield kind.code
        for child in kind.__subclasses__():
            yield from walk(child)

    return set(walk(RankupError))


def page(totals: Mapping[Cell, float], readings: Iterable[Reading]) -> bytes:
    """The text that Prometheus reads (exposition format 0.0.4), from the ledger's totals and the gauges' readings."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot([*_counted_families(totals), *_read_families(list(readings))]))
    text: bytes = generate_latest(registry)
    return text


class _Snapshot:
    """What prometheus_client calls a collector: gives families that were made before."""

    def __init__(self, families: Sequence[Any]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        yield from self._families


def _counted_families(totals: Mapping[Cell, float]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    of_metric: dict[str, dict[Cell, float]] = {}
    for cell, value in totals.items():
        of_metric.setdefault(cell[0], {})[cell[1:]] = value
    for metric in COUNTED:
        cells = of_metric.get(metric.name, {})
        if metric.kind == "counter":
            counter = CounterMetricFamily(metric.name, metric.documentation, labels=metric.labels)
            for labels, value in sorted(cells.items()):
                counter.add_metric(labels, value)
            yield counter
        else:
            histogram = HistogramMetricFamily(metric.name, metric.documentation, labels=metric.labels)
            for labels in sorted({cell[:-1] for cell in cells}):
                histogram.add_metric(labels, _buckets(metric, labels, cells), cells.get((*labels, "sum"), 0.0))
            yield histogram


def _buckets(metric: Metric, labels: Cell, cells: Mapping[Cell, float]) -> list[tuple[str, float]]:
    """Upper bound -> how many values are not above it."""
    found, below = [], 0.0
    for bound in (*metric.bounds, math.inf):
        below += cells.get((*labels, _le(bound)), 0.0)
        found.append((_le(bound), below))
    return found


def _read_families(readings: Sequence[Reading]) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    for metric in READ:
        family = GaugeMetricFamily(metric.name, metric.documentation, labels=metric.labels)
        for reading in readings:
            if reading.metric is metric:
                family.add_metric(reading.labels, reading.value)
        yield family
