from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dfkd_bench import compute
from dfkd_bench.compute import Compute, prepare

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


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that needs not be there: torch's switches are real, and put back afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield torch.device("cuda", 1)
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_process_computes_on_its_own_gpu(second_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    prepare(second_gpu)
    assert chosen == [second_gpu]


def test_fp32_is_not_tf32_on_a_gpu(second_gpu: torch.device) -> None:
    torch.backends.cudnn.allow_tf32 = True
    prepare(second_gpu)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_deterministic_kernels_have_what_they_need(second_gpu: torch.device) -> None:
    prepare(second_gpu, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_cpu_keeps_torchs_switches() -> None:
    prepare(torch.device("cpu"), deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
    ids=["v2", "v2 without limit", "v1", "v1 without limit", "no groups"],
)
def test_a_container_may_have_less_time_than_cores(files: dict[str, str], share: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert compute._quota(tmp_path) == share


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC (family 25, model 17)"),
        ({"model name": "AMD EPYC 9654", "cpu family": "25", "model": "17"}, "AMD EPYC 9654"),
        ({"model name": "Some CPU"}, "Some CPU"),
    ],
)
def test_processors_of_two_generations_have_two_names(
    facts: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of runs on both must not be compared as if made on one machine."""
    monkeypatch.setattr(compute, "_cpu_info", lambda: facts)
    assert compute.hardware(torch.device("cpu"), 1)["cpu"] == name
