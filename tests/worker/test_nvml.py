"""A card behind NVML, with a driver that answers, one that does not, and none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from worker.nvml import Card


class NVMLError(Exception):
    """The driver's refusal."""


def driver(**answers: Callable[[Any], Any]) -> ModuleType:
    """A pynvml whose calls are `answers`; handles are the words by which a card was asked for."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_TEMPERATURE_GPU = 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = lambda number: f"card {number}"
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTemperature = lambda card, sensor: answers["temperature"](card)
    module.nvmlDeviceGetTotalEnergyConsumption = lambda card: answers["energy"](card)
    return module


def refuse(_: Any) -> float:
    raise NVMLError


def test_a_card_is_asked_by_its_uuid_or_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    told = driver(temperature=lambda card: asked.append(card) or 61, energy=lambda card: asked.append(card) or 1500)
    monkeypatch.setitem(sys.modules, "pynvml", told)
    assert Card(2).temperature_c() == 61.0
    assert Card(2, "GPU-1-2").energy_j() == 1.5
    assert asked == ["card 2", "GPU-1-2"]


def test_a_card_that_does_not_tell_gives_nothing_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    monkeypatch.setitem(sys.modules, "pynvml", driver(temperature=lambda card: 50, energy=refuse))
    assert (card.temperature_c(), card.energy_j()) == (50.0, None)
    monkeypatch.setitem(sys.modules, "pynvml", driver(temperature=lambda card: 50, energy=lambda card: 2000))
    assert card.energy_j() == 2.0


def test_without_the_package_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (Card().temperature_c(), Card().energy_j()) == (None, None)
