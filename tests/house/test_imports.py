"""What may be imported when: heavy libraries stay out of the command's start."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "boto3", "botocore", "transformers", "peft", "trl", "datasets", "redis", "fastapi", "numpy")


@pytest.mark.parametrize("module", ["rankup.cli", "rankup.versions", "rankup.pull", "worker.agent"])
def test_importing_what_a_reader_or_a_volunteer_starts_stays_free_of_heavy_libraries(module: str) -> None:
    allowed = {"rankup.cli": ()}.get(module, ("numpy",))
    script = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert set(eval(found)) <= set(allowed), f"import {module} pulls in {found}"  # noqa: S307 - our own output
