"""A record: what one job came to, written once, atomically, and never edited."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from dfkd_bench import __version__
from dfkd_bench.clock import total
from dfkd_bench.errors import UserError, validation_line
from dfkd_bench.files import safe_name
from dfkd_bench.files import write_bytes as write_bytes
from dfkd_bench.files import write_text as write_text
from dfkd_bench.job import PROTOCOL_VERSION, Job
from dfkd_bench.method import Frozen

SCHEMA_VERSION = 1

Status = Literal["done", "failed", "unsupported"]
"""``done``: all epochs ran, however bad the student. ``failed``: an error. ``unsupported``: the method says no."""


Outcome = Literal["ok", "not finite", "collapsed"]
"""Of a run that is done: ``not finite``: the loss became NaN or infinite; ``collapsed``: last accuracy below 1.5 times
chance. Both are results and stay in the table."""


class Point(Frozen):
    """One epoch of a curve: accuracy [%] on held-out images, mean student loss, headline seconds so far."""

    epoch: int
    accuracy: float
    loss: float | None  # None: not finite
    seconds: float


class Score(Frozen):
    """Accuracy, agreement with the teacher and expected calibration error, all in percent."""

    accuracy: float
    agreement: float | None = None
    calibration: float | None = None
    epoch: int


OWN_SHARE = 0.9
"""Of a run's time its process has the processor at least so much, where nothing disturbs it."""


class TeacherFacts(Frozen):
    """The teacher a run had: accuracy [%] on the run's held-out images, SHA-256 of the weights, where from.

    The accuracy of an imported teacher on the validation split is None: it may have been trained on it.
    """

    model: str
    accuracy: float | None
    sha256: str
    origin: str

    @property
    def percent(self) -> str:
        """The accuracy as tables print it."""
        return "-" if self.accuracy is None else f"{self.accuracy:.2f} %"


class MethodFacts(Frozen):
    """Whose code ran: built-in, an entry point or a file; distribution, version, hash of the source."""

    origin: str
    distribution: str
    version: str
    source_sha256: str
    confirmed: bool = True  # False: parts of the method are our reading, see its docstring


class Counters(Frozen):
    """Counted by the runner, not by the method."""

    images_made: int = 0  # images handed to the pool
    images_not_finite: int = 0  # of these: they are black in the pool
    images_clamped: int = 0  # of these: outside of [0, 1]
    teacher_images: int = 0  # images passed through the teacher with gradient in synthesis: the generation cost
    generator_steps: int = 0  # batches, likewise
    guided_images: int = 0  # images passed through the teacher with gradient in student steps (attention, memory, ...)
    student_steps: int = 0
    student_images: int = 0  # rows of all student batches
    extra_rows: int = 0  # rows of student batches beyond the schedule's batch size (replay and the like)


class DataFile(Frozen):
    """A data file that was opened during a run. ``phase``: ``method`` or ``runner`` (evaluation, controls' data)."""

    path: str
    phase: str


class DataFolder(Frozen):
    """A folder whose images the runner has lent to the method: one entry for all of them, and their digest."""

    path: str
    phase: Literal["runner"] = "runner"
    files: int
    digest: str


class Record(Frozen):
    """Everything about one run. ``last`` is the headline; ``best`` is the best epoch *on the evaluated split*."""

    schema_version: int = SCHEMA_VERSION
    job_id: str
    job: Job
    status: Status
    reason: str | None = None  # why it failed, is unsupported, or what went wrong with the student
    outcome: Outcome | None = None
    method: MethodFacts
    knowledge: str  # outside knowledge used
    teacher: TeacherFacts | None = None
    curve: tuple[Point, ...] = ()
    last: Score | None = None
    best: Score | None = None
    seconds: dict[str, float] = {}
    processor_seconds: float | None = None  # of the phases that count, all threads; None: on a GPU, or not recorded
    counters: Counters = Counters()
    peak_memory: int | None = Field(None, description="bytes: GPU allocator, or resident memory on the CPU")
    scalars: dict[str, float | None] = {}  # the method's own, last epoch's mean
    diversity: dict[str, float | None] = {}  # of the images, see ``diversity.measure``; empty: not measured
    files: tuple[DataFile | DataFolder, ...] = ()
    embeddings: dict[str, str] = {}  # encoder, model, revision, prompt, sha256 of the label-text embedding
    hardware: dict[str, str | int] = {}
    earlier_hardware: tuple[dict[str, str | int], ...] = ()  # of a resumed run's other machines, or shares of one
    software: dict[str, str] = {}
    git: dict[str, str | bool] = {}
    resumes: int = 0
    started: str = ""
    finished: str = ""

    @property
    def total_seconds(self) -> float:
        """Headline time: all phases but evaluation and measuring."""
        return total(self.seconds)

    @property
    def machines(self) -> tuple[dict[str, str | int], ...]:
        """All that took part, the last one at the end: with more than one, times are those of neither."""
        return (*self.earlier_hardware, self.hardware)

    @property
    def was_slowed(self) -> bool:
        """Whether something else on the machine had the processor for more than a tenth of the headline time."""
        return self.processor_seconds is not None and self.processor_seconds < OWN_SHARE * self.total_seconds

    def is_of_today(self, sources: Container[str]) -> bool:
        """Whether it is of today's protocol and of the method's code with one of these hashes."""
        return self.method.source_sha256 in sources and self.job.protocol_version == PROTOCOL_VERSION

    def is_fresh(self, sources: Container[str]) -> bool:
        """Whether it is of today, and no failure."""
        return self.is_of_today(sources) and self.status != "failed"


def record_path(output: Path, job: Job) -> Path:
    """``OUTPUT/records/<data set>/<method>/<job id>.json``."""
    return output / "records" / safe_name(job.dataset) / safe_name(job.method) / f"{job.id}.json"


def write(output: Path, record: Record) -> Path:
    """Write a record atomically; returns its path."""
    path = record_path(output, record.job)
    write_text(path, record.model_dump_json(indent=1) + "\n")
    return path


def read(path: Path) -> Record:
    """Read one record; a damaged or foreign file is a ``UserError`` that names it."""
    try:
        content = path.read_bytes()
        version = _schema_version(content)
        if version is not None and version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}: keep it")
        return Record.model_validate_json(content)
    except OSError as error:
        raise UserError(f"can't read the record {path}: {error.strerror or error}") from None
    except ValidationError as error:
        line = f"{path} is damaged or no record of schema version {SCHEMA_VERSION} ({validation_line(error)})"
        raise UserError(f"{line}: put it back, or delete it to have the run done again") from None


def _schema_version(content: bytes) -> int | None:
    """What a record says of itself; another version may have other fields. None: it says nothing."""
    try:
        known = json.loads(content)
    except ValueError:
        return None
    version = known.get("schema_version") if isinstance(known, dict) else None
    return version if isinstance(version, int) else None


def read_all(output: Path) -> Iterator[Record]:
    """All records below ``OUTPUT/records``, in the order of their paths."""
    for path in sorted((output / "records").glob("*/*/*.json")):
        yield read(path)


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@cache
def software() -> dict[str, str]:
    """Versions that a result may depend on."""
    versions = {"dfkd-bench": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "torchvision", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    torch = sys.modules.get("torch")  # imported by whoever computes, and by nobody for this
    if torch is not None and torch.cuda.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["cuda"] = str(torch.version.cuda)
    return versions


@cache
def git_state() -> dict[str, str | bool]:
    """Commit and dirty flag of the checkout that this package was loaded from; empty for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        top = _git(here, "rev-parse", "--show-toplevel")
        if not _git(here, "ls-files", "--", __file__):
            return {}
        # Records and tables under results/ are output: they don't make the code dirty.
        changed = _git(here, "-C", top, "status", "--porcelain", "--", ".", ":!results")
        return {"commit": _git(here, "rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
