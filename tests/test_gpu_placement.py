"""The tests of ``gpu_placement.py``, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_bench import plugins

FILE = Path(__file__).with_name("gpu_placement.py")
FOUND = plugins.discover(())
ROUND = "test_a_round_stays_on_the_gpu_and_the_host_waits_for_nothing"
METHODS = sorted(name for name in FOUND.methods if "training_data" not in FOUND.method(name).needs)
TESTS = [f"{ROUND}[{name}]" for name in METHODS]
TESTS += ["test_a_teachers_epoch_stays_on_the_gpu", "test_an_evaluation_stays_on_the_gpu"]


@pytest.fixture(scope="module")
def child() -> tuple[dict[str, str], str]:
    """Test -> how it ended, and all that was printed."""
    line = [sys.executable, "-P", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", str(FILE)]
    ended = subprocess.run(line, cwd=FILE.parents[1], capture_output=True, text=True, timeout=300, check=False)
    found = re.findall(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", ended.stdout)
    return dict(found), ended.stdout + ended.stderr


@pytest.mark.parametrize("name", TESTS)
def test_on_a_gpu_that_is_not_there(name: str, child: tuple[dict[str, str], str]) -> None:
    found, printed = child
    if found.get(name) == "SKIPPED":
        pytest.skip("for a PyTorch with CUDA and without a GPU")
    if name not in found and "Segmentation fault" in printed:
        pytest.skip("PyTorch crashed in the process of tensors without numbers")
    assert found.get(name) == "PASSED", printed
