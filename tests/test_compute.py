from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfkd_bench.compute import Compute

FAULTS = """
import resource, sys, torch
from dfkd_bench.compute import set_threads
if sys.argv[1] == "kept":
    set_threads(1)
for _ in range(3):
    torch.empty(16 << 20).fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.empty(16 << 20).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str, folder: Path) -> int:
    """Of a process that takes and frees 64 MiB forty times."""
    command = [sys.executable, "-c", FAULTS, way]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_memory_that_a_run_frees_is_used_again(tmp_path: Path) -> None:
    assert page_faults("kept", tmp_path) < page_faults("plain", tmp_path) / 4


def test_a_step_within_bf16_sees_the_weights_of_the_step_before() -> None:
    layer, images = torch.nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8)
    with Compute(torch.device("cpu"), "bf16").autocast():
        before = layer(images)
        with torch.no_grad():
            layer.weight.add_(1)
        assert not torch.equal(layer(images), before)
