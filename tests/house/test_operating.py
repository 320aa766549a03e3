"""Prometheus' configuration, its alerts, the dashboard and docs/operating.md name only what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator import metrics, routes_metrics
from coordinator.exchange import QUIET
from coordinator.metrics import COUNTED, READ
from rankup.local import LocalSettings
from rankup.settings import CoordinatorSettings, LedgerSettings, RoomSettings, StoreSettings

ROOT = Path(__file__).parents[2]
RULES, DASHBOARD, MANUAL = "infra/prometheus/rules.yml", "infra/grafana/rankup.json", "docs/operating.md"
METRIC = re.compile(r"\brankup_[a-z0-9_]+\b")
SELECTOR = re.compile(r"\b(rankup_[a-z0-9_]+)\{([^{}]*(?:\{[a-z_]+\}[^{}]*)*)\}")
GROUPING = re.compile(r"\b(?:by|on) \(([a-z_, ]+)\)")


def names() -> set[str]:
    found = {metric.name for metric in (*COUNTED, *READ)}
    for metric in COUNTED:
        if metric.kind == "histogram":
            found |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    return found


def expressions() -> list[str]:
    rules = yaml.safe_load((ROOT / RULES).read_text())
    dashboard = json.loads((ROOT / DASHBOARD).read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return found + [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


@pytest.mark.parametrize("file", [RULES, DASHBOARD, MANUAL])
def test_every_metric_that_is_named_exists(file: str) -> None:
    named = set(METRIC.findall((ROOT / file).read_text()))
    assert named
    assert named <= names()


def test_every_metric_is_explained_and_on_the_dashboard_or_in_an_alert() -> None:
    manual = (ROOT / MANUAL).read_text()
    assert {metric.name for metric in (*COUNTED, *READ)} <= set(METRIC.findall(manual))
    used = METRIC.findall(" ".join(expressions()))
    assert {metric.name for metric in (*COUNTED, *READ)} <= {re.sub("_(bucket|sum|count)$", "", name) for name in used}


def test_expressions_use_labels_that_their_metrics_have() -> None:
    labels = {metric.name: {*metric.labels, "le"} for metric in (*COUNTED, *READ)}
    known = {label for each in labels.values() for label in each}
    for expression in expressions():
        assert expression.count("(") == expression.count(")"), expression
        for name, selector in SELECTOR.findall(expression):
            asked = set(re.findall(r"([a-z_]+)\s*(?:=~|!=|!~|=)", selector))
            assert asked <= labels[re.sub("_(bucket|sum|count)$", "", name)], expression
        for group in GROUPING.findall(expression):
            assert set(group.replace(",", " ").split()) <= known, expression


def test_every_alert_says_what_to_do() -> None:
    rules = yaml.safe_load((ROOT / RULES).read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 10
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "warn")
        assert alert["annotations"].keys() == {"summary", "remedy"}


def test_the_scrape_asks_our_route_with_a_token() -> None:
    [job] = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text())["scrape_configs"]
    paths: list[Any] = [route.path for route in routes_metrics.router.routes]
    assert job["metrics_path"] in paths
    assert job["authorization"]["type"] == "Bearer"
    assert "credentials" not in job["authorization"]
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{CoordinatorSettings().port}"]


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    panels = json.loads((ROOT / DASHBOARD).read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_setting_that_the_manual_names_exists() -> None:
    rooms: tuple[type[RoomSettings], ...] = (StoreSettings, LedgerSettings, CoordinatorSettings, LocalSettings)
    known = {f"{room.model_config['env_prefix']}{name.upper()}" for room in rooms for name in room.model_fields}
    known |= {"RANKUP_HOME", "RANKUP_LOG", "RANKUP_LOG_LEVEL", "RANKUP_LOG_FILE"}
    assert set(re.findall(r"\bRANKUP_[A-Z_]+\b(?!\*)", (ROOT / MANUAL).read_text())) <= known


def test_quiet_routes_are_in_the_manual() -> None:
    manual = (ROOT / MANUAL).read_text()
    assert all(route in manual for route in QUIET)
    assert metrics.UNMATCHED in manual
