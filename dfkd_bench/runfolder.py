"""The folder of one run: its lease, its metrics, its checkpoint. A run's state lives here and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from dfkd_bench.checkpoint import load_tree, save_tree
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job
from dfkd_bench.lease import Lease, held, is_stale
from dfkd_bench.paths import home
from dfkd_bench.pool import Pool
from dfkd_bench.record import write_bytes, write_text

IMAGES = "images.safetensors"
STUDENT = "student.safetensors"
LOG = "log.txt"


class RunFolder:
    """``$DFKD_BENCH_HOME/runs/<job id>/``: job.json, metrics.jsonl, log.txt, lease, checkpoint/, student and images."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.path = home() / "runs" / job.id
        self._checkpoint = self.path / "checkpoint"
        self._stored = 0  # pool rows in the append-only files
        self._lease: Lease | None = None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return (self._checkpoint / "state.safetensors").is_file()

    def create(self) -> None:
        """Make the folder and its job.json; images of an earlier run of the job go."""
        (self.path / IMAGES).unlink(missing_ok=True)
        write_text(self.path / "job.json", self.job.model_dump_json(indent=1) + "\n")

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the run exclusively; raises ``Busy`` while another living process has it."""
        with held(self.path / "lease", f"run {self.job.id}") as self._lease:
            yield

    def check_lease(self) -> None:
        """Raises ``Busy`` if another process has taken the run over: from then on its files are that one's alone."""
        if self._lease is not None:
            self._lease.check()

    @property
    def is_running(self) -> bool:
        """Whether a living process has the run."""
        path = self.path / "lease"
        return path.exists() and not is_stale(path)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """One JSON line an epoch, for people and tools that look in while it runs."""
        self.check_lease()
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def set_metrics(self, lines: Iterable[dict[str, Any]]) -> None:
        """Those of the epochs before a checkpoint: what a killed process wrote after it comes again."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def log(self, text: str) -> None:
        """Add ``text`` to log.txt, for whoever wants to know more than the record says."""
        with (self.path / LOG).open("a") as file:
            file.write(text)

    def save(self, state: dict[str, Any], pool: Pool) -> None:
        """Checkpoint: append the pool's new rows to their files, then replace the rest atomically.

        In this order a crash in between leaves rows too many, which the next start cuts off, never too few.
        """
        self.check_lease()
        self._checkpoint.mkdir(parents=True, exist_ok=True)
        new = pool.made - self._stored
        kinds = {"images": pool.images, **{f"extra-{name}": rows for name, rows in pool.extras.items()}}
        if new:
            kept = min(new, len(pool))  # with a cap, rows made and dropped again since the last save are not needed
            for name, rows in kinds.items():
                _append(self._checkpoint / f"{name}.bin", rows[len(pool) - kept :], self._stored + new - kept)
            self._stored = pool.made
        self.check_lease()  # the files may have hung just now
        layout = {name: [str(rows.dtype).removeprefix("torch."), list(rows.shape[1:])] for name, rows in kinds.items()}
        save_tree(self._checkpoint / "state.safetensors", {"state": state, "pool": pool.state_dict(), "layout": layout})

    def load(self, pool: Pool, fits: Callable[[dict[str, Any]], bool] = lambda state: True) -> dict[str, Any]:
        """The state that ``save`` got; the pool is filled. A damaged checkpoint is a ``UserError`` that names it.

        A state that ``fits`` says no to is forgotten: then this returns an empty one.
        """
        try:
            saved = load_tree(self._checkpoint / "state.safetensors")
            state: dict[str, Any] = saved["state"]
            if not fits(state):
                self.forget_checkpoint()
                return {}
            made, size = saved["pool"]["made"], saved["pool"]["size"]
            rows = {
                name: _read(self._checkpoint / f"{name}.bin", dtype, shape, made - size, size)
                for name, (dtype, shape) in saved["layout"].items()
            }
            images = rows.pop("images")
            pool.load_state_dict(
                saved["pool"], images, {name.removeprefix("extra-"): extra for name, extra in rows.items()}
            )
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"the checkpoint of run {self.job.id} can't be read ({error}): delete {self.path} to start it anew"
            ) from None
        self._stored = made
        return state

    def keep_images(self, kept: dict[str, Tensor]) -> None:
        """Write images for the gallery (``diversity.keepsakes``)."""
        self.check_lease()
        write_bytes(self.path / IMAGES, safetensors.torch.save(kept))

    def forget_checkpoint(self) -> None:
        """After the record of a run that is over is written."""
        shutil.rmtree(self._checkpoint, ignore_errors=True)


def log_file(job_id: str) -> Path:
    """Where the traceback of a failed run is, if the run was made on this machine."""
    return home() / "runs" / job_id / LOG


def student_file(job_id: str) -> Path:
    """Where the trained student of a run is, if the run was made on this machine."""
    return home() / "runs" / job_id / STUDENT


def kept_images(job_id: str) -> dict[str, np.ndarray] | None:
    """The images that a run has kept; None if they are not on this machine."""
    path = home() / "runs" / job_id / IMAGES
    return safetensors.numpy.load_file(path) if path.is_file() else None


def _append(path: Path, rows: Tensor, position: int) -> None:
    """Write ``rows`` at row ``position`` of the file, cutting off what a crash left behind it."""
    data = rows.cpu().contiguous()
    row_bytes = data[0].numel() * data.element_size()
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(position * row_bytes)  # also extends with zeros over rows that a cap dropped unsaved
        file.seek(position * row_bytes)
        file.write(data.view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, dtype: str, shape: list[int], position: int, count: int) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    row_bytes = int(np.prod(shape, dtype=np.int64)) * torch.empty((), dtype=kind).element_size()
    if count == 0:
        return torch.empty((0, *shape), dtype=kind)
    with path.open("rb") as file:
        file.seek(position * row_bytes)
        data = bytearray(file.read(count * row_bytes))
    if len(data) != count * row_bytes:
        raise ValueError(f"{path.name} is too short")
    return torch.frombuffer(data, dtype=torch.uint8).view(kind).view(count, *shape)
