"""A sample of what `benchmarks/corruption.py` does a thousand times: one byte of a published history is changed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNT = 85
"""Five of each kind of file."""


def test_a_changed_byte_in_any_kind_of_file_is_found_and_destroys_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/corruption.py", "--count", str(COUNT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {COUNT} detected" in done.stdout
    assert "0 missed, met" in done.stdout
