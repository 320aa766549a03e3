"""The toy world, and models with trained adapters, as fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See `peft_world.trained_llamas`; made once, and torch is loaded only for those who ask."""
    from peft_world import trained_llamas

    return trained_llamas(tmp_path_factory.mktemp("llamas"))
