"""Run one job: the one loop of the suite, with checkpoint and resume. It names no method and no data set."""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd_bench import data, diversity, lend, plugins, record, teachers, text
from dfkd_bench.augment import Normalize, random_crop_flip, to_unit
from dfkd_bench.checkpoint import Pace, random_state, restore_random_state, seed_everything
from dfkd_bench.clock import Clock, peak_memory, total
from dfkd_bench.compute import Compute, hardware, prepare, resolve_device, set_threads
from dfkd_bench.errors import UserError, disk_error, place_in
from dfkd_bench.evaluate import evaluate, logits_of
from dfkd_bench.job import Job
from dfkd_bench.lease import Busy
from dfkd_bench.method import Method, Progress, Task
from dfkd_bench.models import build_model
from dfkd_bench.once import looking_once
from dfkd_bench.optimise import build_optimizer, learning_rate, set_learning_rate
from dfkd_bench.paths import data_root, expanded, home
from dfkd_bench.pool import Pool
from dfkd_bench.record import Counters, DataFile, DataFolder, MethodFacts, Outcome, Point, Record, Score, TeacherFacts
from dfkd_bench.runfolder import STUDENT, RunFolder
from dfkd_bench.teach import teaching
from dfkd_bench.watch import FileWatch


@dataclass(frozen=True)
class Place:
    """Where and with what a job is run: nothing in here changes its result."""

    output: Path
    data_root: Path | None = None
    plugin_files: tuple[Path, ...] = ()
    device: str = "auto"
    threads: int = 1
    workers: int = 1
    deterministic: bool = False
    keep_failed: bool = False  # a failed record that is there already stands; else its job is run again


@dataclass(frozen=True)
class EpochDone:
    """Reported after each epoch."""

    epoch: int  # finished epochs
    epochs: int
    accuracy: float | None


class NotDataFree(Exception):
    """A method opened data files while it ran."""


class TeacherChanged(Exception):
    """A method changed the teacher, and so what every accuracy refers to."""


class OverBudget(Exception):
    """Protocol `equal`: synthesis passed more images through the teacher than every method is allowed."""


def run(job: Job, place: Place, report: Callable[[EpochDone], None] = lambda done: None) -> Record:
    """Run ``job``, or go on with it, and write its record. An exception of the method becomes a failed record.

    A failed run keeps its checkpoint: what was wrong may not have been the method, but memory or a network folder. A
    record that another process has made since the run was planned is returned as it is, a failed one if ``place`` says
    so.

    Raises ``Busy`` if another process has the run, or has taken it over meanwhile, ``UserError`` for what the user must
    put right first.
    """
    folder = RunFolder(job)
    with folder.lease(), looking_once():
        found = plugins.discover(place.plugin_files)
        path = record.record_path(place.output, job)
        if path.is_file():
            made, sources = record.read(path), found.source(job.method).same_results()
            if made.is_of_today(sources) if place.keep_failed else made.is_fresh(sources):
                return made
        folder.create()
        set_threads(place.threads)
        started, facts = record.now(), _method_facts(found.source(job.method))
        try:
            result = _Run(job, place, found, folder).finish(report, started)
        except (UserError, Busy, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:  # a method may call sys.exit
            if isinstance(error, OSError) and (problem := disk_error(error)):
                raise problem from error
            folder.check_lease()  # else the error may come from the other process's files
            folder.log(traceback.format_exc())
            at = place_in(error, found.methods[job.method].path)  # its card may have been broken meanwhile
            result = failed(job, found, f"{type(error).__name__}: {_first_line(error)}{at}", started, facts)
        folder.check_lease()
        record.write(place.output, result)
        if result.status != "failed":
            folder.forget_checkpoint()
    return result


def failed(
    job: Job, found: plugins.Plugins, reason: str, started: str = "", facts: MethodFacts | None = None
) -> Record:
    """The record of a job that ended in an error: a row in the table, never a silent gap.

    The method's file may have been edited meanwhile, or be gone, which must not hide the error. ``facts``: of the code
    that ran, where they are known.
    """
    source = found.methods.get(job.method)
    knowledge = source.card().get("knowledge") if source else None
    if facts is None and source is None:
        facts = MethodFacts(origin="gone", distribution="", version="", source_sha256="")
    if facts is None and source is not None:
        try:
            facts = _method_facts(source)
        except (OSError, SyntaxError, ValueError):
            facts = MethodFacts(
                origin=source.kind, distribution=source.distribution, version=source.version, source_sha256=""
            )
    return Record(
        job_id=job.id,
        job=job,
        status="failed",
        reason=reason,
        method=facts,
        knowledge=knowledge if isinstance(knowledge, str) else "not stated",
        software=record.software(),
        git=record.git_state(),
        started=started,
        finished=record.now(),
    )


def stream_seed(seed: int, name: str) -> int:
    """The seed of one random stream of a run. It depends on the seed and the stream's name alone, so that all
    methods start from the same student at the same seed: seeds are paired."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


@dataclass
class Tally:
    """The mutable side of ``record.Counters``."""

    teacher_images: int = 0
    generator_steps: int = 0
    guided_images: int = 0
    student_steps: int = 0
    student_images: int = 0
    extra_rows: int = 0


@dataclass
class _Bench:
    """What a run is made of, once everything is loaded."""

    method: Method
    student: nn.Module
    optimizer: torch.optim.Optimizer
    pool: Pool
    streams: dict[str, torch.Generator]
    counts: Tally
    scalars: dict[str, Tensor] = field(default_factory=dict)


class _Run:
    """One run in progress. The order of the functions is the order of the loop."""

    def __init__(self, job: Job, place: Place, found: plugins.Plugins, folder: RunFolder) -> None:
        self.job, self.place, self.found, self.folder = job, place, found, folder
        self.device = resolve_device(place.device)
        prepare(self.device, place.deterministic)
        self.compute = Compute(self.device, job.precision)
        self.clock = Clock(self.device)
        self.pace = Pace()
        source = found.source(job.method)
        self.facts = _method_facts(source)  # of the code that runs, whatever is edited meanwhile
        self.card = source.card()  # likewise
        self.dataset = data.dataset(job.dataset, place.data_root, found.datasets)
        self.normalize = Normalize(self.dataset.mean, self.dataset.std, self.device)
        # The run's own files and the teacher's weights are no data.
        own = [folder.path, place.output / "records", place.output / "teachers", home() / "teachers"]
        # Not the whole data root: Python itself may lie somewhere below it.
        raw, root = self.dataset.raw, data_root(place.data_root)
        raw_files = [path for file in (*raw.train, *raw.test) for path in raw.candidates(root, file)]
        self.watch = FileWatch([self.dataset.folder, home() / "data", *raw_files], ignored=own)
        with self.watch.on():
            self.teacher = teachers.load(self.dataset, job.teacher, self.device, found.models, place.output)
            self.held_out = teachers.labelled(self.dataset, (job.evaluate_on,), place.data_root, self.device)
        self.compute.place(self.teacher.model)
        self._teacher_before = fingerprint(self.teacher.model)
        self.teach = teaching(self.teacher.model, self.compute)
        self.embeddings: dict[str, str] = {}
        self.lent: dict[str, data.FolderFacts] = {}  # by the folder's path
        self.curve: list[Point] = []
        self.best: Score | None = None
        self.last: Score | None = None
        self.resumes = 0
        self.earlier_hardware: list[dict[str, str | int]] = []
        self.earlier_peak = 0
        self.synthesizing = False
        self.measuring = False
        self.outcome: Outcome | None = None

    def finish(self, report: Callable[[EpochDone], None], started: str) -> Record:
        """All that is left of the run."""
        method_class = self.found.method(self.job.method)
        config = method_class.Config(**self.job.config)
        knowledge = method_class.outside_knowledge(config) or self.card.get("knowledge", "not stated")
        if not isinstance(knowledge, str):  # now, not in the record after all epochs
            raise TypeError(f"outside_knowledge returned a {type(knowledge).__name__}, expected a text or None")
        streams = {
            name: torch.Generator(self.device).manual_seed(stream_seed(self.job.seed, name))
            for name in ("pool", "augment", "method")
        }
        counters, measures = Counters(), dict[str, float | None]()
        with self.watch.on():
            task = self._task(method_class, config, streams)
            reason = self._unsupported(method_class, config, task)
            if reason is None:
                bench = self._set_up(method_class, config, task, streams)
                epoch = self._resume(bench)
                self._train(bench, epoch, report)
                self._refuse_data_files(method_class)
                self._refuse_another_teacher()
                student = {name: tensor.cpu().contiguous() for name, tensor in bench.student.state_dict().items()}
                self.folder.check_lease()
                record.write_bytes(self.folder.path / STUDENT, safetensors.torch.save(student))
                not_finite, outside = bench.pool.unfit
                counters = Counters(
                    images_made=bench.pool.made,
                    images_not_finite=not_finite,
                    images_clamped=outside,
                    **vars(bench.counts),
                )
            memory = self._peak()  # of the method, not of measuring
            if reason is None:
                measures = self._measure(bench, task)
        machine = self._hardware()
        return Record(
            job_id=self.job.id,
            job=self.job,
            status="done" if reason is None else "unsupported",
            reason=reason,
            outcome=self.outcome,
            method=self.facts,
            knowledge=knowledge,
            teacher=TeacherFacts(
                model=self.teacher.card.model,
                accuracy=self.teacher.card.accuracy.get(self.job.evaluate_on),
                sha256=self.teacher.card.sha256,
                origin=self.teacher.card.origin,
            ),
            curve=tuple(self.curve),
            last=self.last,
            best=self.best,
            seconds={name: round(value, 4) for name, value in self.clock.settle().items()},
            processor_seconds=None if self.clock.processor is None else round(self.clock.processor, 4),
            counters=counters,
            peak_memory=memory,
            scalars={name: _finite(value.item()) for name, value in bench.scalars.items()} if reason is None else {},
            diversity=measures,
            files=tuple(self._opened(path, phase) for path, phase in self.watch.files),
            embeddings=self.embeddings,
            hardware=machine,
            earlier_hardware=tuple(other for other in self.earlier_hardware if other != machine),
            software=record.software(),
            git=record.git_state(),
            resumes=self.resumes,
            started=started,
            finished=record.now(),
        )

    # -- before the loop ------------------------------------------------------------------------------------------

    def _task(self, method_class: type[Method], config: Any, streams: dict[str, torch.Generator]) -> Task:
        needs, root = method_class.needs, self.place.data_root
        lent: dict[str, Any] = {}
        if "training_data" in needs:
            lent["training_data"] = lend.training_data(
                self.dataset, self.job.teacher, self.job.evaluate_on, root, self.device
            )
        if "unlabelled" in needs:
            with self._lending(lend.folder_of(config.pool)):
                lent["unlabelled"] = lend.pool(config.pool, self.dataset, root, self.device, self.found.datasets)
        if "initial_images" in needs and config.initial_images is not None:
            with self._lending(expanded(config.initial_images)):
                first = lend.initial_images(config.initial_images, self.dataset, root, self.found.datasets)
                lent["initial_images"] = first.to(self.device)
        padding, flip = self.dataset.image_shape[1] // 8, self.dataset.flip_keeps_class

        def augment(images: Tensor) -> Tensor:
            return images if self.measuring else random_crop_flip(images, padding, flip, streams["augment"])

        return Task(
            teacher=self.teacher.model,
            teach=self.teach,
            num_classes=self.dataset.num_classes,
            class_names=tuple(self.dataset.class_names),
            image_shape=self.dataset.image_shape,
            device=self.device,
            normalize=self.normalize,
            augment=augment,
            flip_keeps_class=flip,
            crop_padding=padding,
            rng=streams["method"],
            label_embeddings=self._label_embeddings,
            **lent,
        )

    @contextmanager
    def _lending(self, folder: Path | None) -> Iterator[None]:
        """Images of ``folder`` are lent inside: one entry in the record stands for all of them."""
        if folder is None:
            yield
            return
        with self.watch.lending(folder):
            self.lent[str(folder.resolve())] = lend.folder_facts(folder)
            yield

    def _opened(self, path: str, phase: str) -> DataFile | DataFolder:
        facts = self.lent.get(path) if phase == "runner" else None
        if facts is None:
            return DataFile(path=self._public(path), phase=phase)
        return DataFolder(path=self._public(path), files=facts.files, digest=facts.digest)

    def _label_embeddings(self, encoder: str, prompt: str) -> Tensor:
        with self.watch.runner():  # a matrix of the user's (file:PATH) is no data file that the method opened
            loaded = text.load(self.dataset.name, self.dataset.class_names, encoder, prompt, self.found.encoders)
        self.embeddings = loaded.facts()
        return torch.as_tensor(loaded.matrix, dtype=torch.float32, device=self.device)

    def _unsupported(self, method_class: type[Method], config: Any, task: Task) -> str | None:
        has_batchnorm = any(isinstance(module, nn.BatchNorm2d) for module in self.teacher.model.modules())
        if "batchnorm" in method_class.needs and not has_batchnorm:
            return f"teacher {self.job.teacher.model} has no BatchNorm2d layer"
        return method_class.unsupported(config, task)

    def _set_up(
        self, method_class: type[Method], config: Any, task: Task, streams: dict[str, torch.Generator]
    ) -> _Bench:
        schedule = self.job.schedule
        seed_everything(stream_seed(self.job.seed, "student"))
        student = build_model(
            self.job.student, self.dataset.num_classes, self.dataset.image_shape[0], self.found.models
        )
        student = self.compute.place(student)
        optimizer = build_optimizer(student.parameters(), schedule)
        full = self.job.protocol == "equal"
        pool = Pool(
            self.dataset.image_shape,
            self.device,
            streams["pool"],
            schedule.pool_cap,
            full_batches=full,
            adds=schedule.rounds,
        )
        seed_everything(stream_seed(self.job.seed, "global"))
        with self.clock.phase("setup"), self.watch.method():
            method = method_class(config, task)
        counts = Tally()
        count_gradient_passes(self.teacher.model, counts, lambda: self.synthesizing)
        return _Bench(method, student, optimizer, pool, streams, counts)

    # -- the loop -------------------------------------------------------------------------------------------------

    def _train(self, bench: _Bench, first: int, report: Callable[[EpochDone], None]) -> None:
        schedule = self.job.schedule
        with self.clock.phase("evaluation"), self.compute.autocast():
            teacher_classes = logits_of(self.teacher.model, self.held_out.images, self.normalize).argmax(dim=1)
        report(EpochDone(first, schedule.epochs, None))
        for epoch in range(first, schedule.epochs):
            losses = torch.zeros((), device=self.device)
            trained = max(0, epoch - schedule.warmup_epochs)  # finished epochs with a student phase
            set_learning_rate(bench.optimizer, learning_rate(schedule, trained))
            for round_ in range(schedule.rounds_per_epoch):
                at = Progress(epoch, round_, schedule.epochs, schedule.warmup_epochs)
                self._synthesis_phase(bench, at)
                if not at.warming_up:
                    losses += self._student_phase(bench, at)
            seconds = self.clock.settle()
            if epoch >= schedule.warmup_epochs:
                mean_loss = _finite(losses.item() / (schedule.rounds_per_epoch * schedule.student_steps))
                self._evaluate(bench, epoch, mean_loss, total(seconds), teacher_classes)
            report(EpochDone(epoch + 1, schedule.epochs, self.last.accuracy if self.last else None))
            if self.outcome == "not finite":  # a recorded outcome: further steps can't change it
                break
            if epoch + 1 < schedule.epochs and self.pace.is_due:
                with self.pace.writing():
                    self._checkpoint(bench, epoch + 1)
        if self.outcome is None:
            assert self.last is not None
            self.outcome = "collapsed" if self.last.accuracy < 150 / self.dataset.num_classes else "ok"

    def _synthesis_phase(self, bench: _Bench, at: Progress) -> None:
        # Parameters of the student need no gradient here: images do, through it.
        bench.student.eval().requires_grad_(False)
        self.synthesizing = True
        with self.clock.phase("synthesis"):
            with self.watch.method(), self.compute.autocast():
                made = bench.method.synthesize(bench.student, at)
            if made.images is not None:
                if not made.images.is_floating_point():
                    raise TypeError(f"`synthesize` returned images of {made.images.dtype}, expected floats in [0, 1]")
                bench.pool.add(made.images, made.extras)
        self.synthesizing = False
        if self.job.generation_cap is not None and bench.counts.teacher_images > self.job.generation_cap:
            raise OverBudget(
                f"synthesis passed {bench.counts.teacher_images:,} images through the teacher by epoch {at.epoch}; "
                f"protocol equal allows {self.job.generation_cap:,}"
            )
        bench.scalars = dict(made.scalars)
        bench.student.train().requires_grad_(True)

    def _student_phase(self, bench: _Bench, at: Progress) -> Tensor:
        """The student steps of one round; returns the sum of their losses, still on the device."""
        schedule, method, student = self.job.schedule, bench.method, bench.student
        losses = torch.zeros((), device=self.device)
        for _ in range(schedule.student_steps):
            with self.clock.phase("sampling"), self.watch.method(), self.compute.autocast():
                batch = method.student_batch(bench.pool, schedule.batch_size, at)
            with self.clock.phase("distillation"), self.watch.method():
                with self.compute.autocast():
                    loss = method.student_loss(student, batch, at)
                bench.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if schedule.clip_norm is not None:
                    nn.utils.clip_grad_norm_(student.parameters(), schedule.clip_norm)
                bench.optimizer.step()
                with self._autocast_after():
                    method.after_student_step(student, batch, at)
            losses += loss.detach()
            rows = batch.images.shape[0]
            bench.counts.student_steps += 1
            bench.counts.student_images += rows
            bench.counts.extra_rows += max(0, rows - schedule.batch_size)
        return losses

    def _autocast_after(self) -> AbstractContextManager[object]:
        """For what a method does after a student step: replay trains its memory there, through the teacher.

        On a CPU it is fp32, as in the records that were made so; on a GPU that would be without TF32 and slow.
        """
        return self.compute.autocast() if self.device.type == "cuda" else nullcontext()

    def _evaluate(self, bench: _Bench, epoch: int, loss: float | None, seconds: float, teacher_classes: Tensor) -> None:
        with self.clock.phase("evaluation"), self.compute.autocast():
            found = evaluate(bench.student, self.held_out.images, self.held_out.labels, self.normalize, teacher_classes)
        calibration = _finite(found.calibration)
        self.last = Score(accuracy=found.accuracy, agreement=found.agreement, calibration=calibration, epoch=epoch)
        if self.best is None or found.accuracy > self.best.accuracy:
            self.best = self.last
        self.curve.append(Point(epoch=epoch, accuracy=found.accuracy, loss=loss, seconds=round(seconds, 4)))
        self.folder.append_metrics(self.curve[-1].model_dump())
        if loss is None:
            self.outcome = "not finite"

    # -- after the loop -------------------------------------------------------------------------------------------

    def _measure(self, bench: _Bench, task: Task) -> dict[str, float | None]:
        """The diversity of the images that the student gets in the end; a few of them are kept for the gallery.

        All is over when this begins, so that it changes no result. What goes wrong here costs no run: it is logged.
        """
        if self.outcome == "not finite":
            return {}
        self.measuring = True
        lent = task.training_data is not None or task.unlabelled is not None
        try:
            with self.clock.phase("measuring"):
                teacher, normalize = self.teacher.model, self.normalize
                limit = min(diversity.SAMPLE, len(bench.pool) or diversity.SAMPLE)
                made = diversity.look(teacher, self._student_images(bench), normalize, limit)
                if lent:  # images that are drawn once more in the next pass are none that the method repeats
                    made = diversity.distinct(made)
                measures = diversity.measure(made, diversity.look(teacher, self._real_images(), normalize))
                kept = diversity.keepsakes(made)
        except Exception:
            self.folder.log(f"diversity was not measured:\n{traceback.format_exc()}")
            return {}
        finally:
            self.measuring = False
        self.folder.keep_images(kept)
        return measures | {"duplicates": None} if lent else measures

    def _student_images(self, bench: _Bench) -> Iterator[Tensor]:
        """Further student batches, normalised, without the data set's augmentation; one pass over the pool."""
        schedule, pool = self.job.schedule, bench.pool
        stream = torch.Generator().manual_seed(stream_seed(self.job.seed, "diversity"))
        view = diversity.OnePass(pool.images, pool.extras, stream, self.device)
        at = Progress(schedule.epochs - 1, schedule.rounds_per_epoch - 1, schedule.epochs, schedule.warmup_epochs)
        while True:
            # A batch may take gradients (a memory's latents are tuned), whatever the looker has switched off.
            with self.watch.method(), self.compute.autocast(), torch.enable_grad():
                batch = bench.method.student_batch(view, schedule.batch_size, at)
            yield batch.images

    def _real_images(self) -> Iterator[Tensor]:
        """Held-out images, normalised: the same ones for all runs on a data set."""
        stream = torch.Generator().manual_seed(stream_seed(0, "real images"))
        order = torch.randperm(self.held_out.images.shape[0], generator=stream).to(self.device)
        for rows in order.split(500):
            yield self.normalize(to_unit(self.held_out.images[rows]))

    # -- between the epochs ---------------------------------------------------------------------------------------

    def _checkpoint(self, bench: _Bench, epoch: int) -> None:
        state = {
            "made_by": self._made_by(),
            "epoch": epoch,
            "student": bench.student.state_dict(),
            "optimizer": bench.optimizer.state_dict(),
            "method": bench.method.state_dict(),
            "random": random_state(self.device),
            "streams": {name: stream.get_state() for name, stream in bench.streams.items()},
            "seconds": self.clock.settle(),
            "processor": self.clock.processor,
            "counts": vars(bench.counts),
            "curve": [point.model_dump() for point in self.curve],
            "best": None if self.best is None else self.best.model_dump(),
            "last": None if self.last is None else self.last.model_dump(),
            "files": [list(pair) for pair in self.watch.files],
            "resumes": self.resumes,
            "hardware": [*(other for other in self.earlier_hardware if other != self._hardware()), self._hardware()],
            "peak_memory": self._peak(),
        }
        self.folder.save(state, bench.pool)

    def _resume(self, bench: _Bench) -> int:
        """Restore the last checkpoint, if there is one that fits; returns the epoch to go on with."""
        state = self.folder.load(bench.pool, self._fits) if self.folder.has_checkpoint else {}
        if not state:
            (self.folder.path / "metrics.jsonl").unlink(missing_ok=True)
            return 0
        bench.student.load_state_dict(state["student"])
        bench.optimizer.load_state_dict(state["optimizer"])
        bench.method.load_state_dict(_on(state["method"], self.device))
        for name, stream in bench.streams.items():
            stream.set_state(state["streams"][name])
        bench.counts.__dict__.update(state["counts"])
        self.curve = [Point(**point) for point in state["curve"]]
        self.folder.set_metrics(point.model_dump() for point in self.curve)
        self.best = Score(**state["best"]) if state["best"] else None
        self.last = Score(**state["last"]) if state["last"] else None
        self.clock.resume(state["seconds"], state.get("processor"))
        self.watch.recall([(path, phase) for path, phase in state["files"]])
        self.resumes = state["resumes"] + 1
        self.earlier_hardware = state.get("hardware", [])  # not in checkpoints of earlier versions
        self.earlier_peak = state.get("peak_memory", 0)
        restore_random_state(state["random"], self.device)
        epoch: int = state["epoch"]
        return epoch

    def _hardware(self) -> dict[str, str | int]:
        return hardware(self.device, self.place.workers)

    def _peak(self) -> int:
        """Peak memory of all processes of the run so far [bytes]."""
        return max(self.earlier_peak, peak_memory(self.device))

    def _made_by(self) -> dict[str, str]:
        """What a checkpoint can't do without: going on with anything else would be another run."""
        source, teacher = self.facts.source_sha256, self.teacher.card.sha256
        return {"source": source, "teacher": teacher, "device": self.device.type}

    def _fits(self, state: Mapping[str, Any]) -> bool:
        """Whether the run can go on from ``state``. The device is the user's choice, so another one is a question."""
        made_by, mine = state.get("made_by", {}), self._made_by()
        code = self.found.source(self.job.method).same_code()
        if made_by.get("source") not in code or made_by.get("teacher") != mine["teacher"]:
            self.folder.log("started anew: the checkpoint is of other code of the method, or of another teacher\n")
            return False
        if made_by["device"] != mine["device"]:
            raise UserError(
                f"run {self.job.id} was interrupted on {made_by['device']} and can't go on on {mine['device']}: give "
                f"--device {made_by['device']}, or delete {self.folder.path} to start it anew"
            )
        return True

    def _refuse_data_files(self, method_class: type[Method]) -> None:
        opened = [path for path, phase in self.watch.files if phase == "method"]
        if opened and "training_data" not in method_class.needs:
            raise NotDataFree(f"the method opened data files while it ran: {', '.join(map(self._public, opened[:3]))}")

    def _refuse_another_teacher(self) -> None:
        if not torch.equal(self._teacher_before, fingerprint(self.teacher.model)):
            raise TeacherChanged("the method has changed the teacher's weights or buffers: `check` finds where")

    def _public(self, path: str) -> str:
        """A path as it may stand in a record that is passed on: without the user's folders."""
        for name, folder in (("$DFKD_BENCH_HOME", home()), ("$DFKD_BENCH_DATA", self.place.data_root)):
            if folder is not None and path.startswith(str(folder.resolve())):
                return name + path.removeprefix(str(folder.resolve()))
        parts = Path(path).parts
        return path if len(parts) <= 4 else str(Path("...", *parts[-3:]))


def fingerprint(model: nn.Module) -> Tensor:
    """One number for each weight and buffer, which a change moves in all likelihood; int64 [n], the bits of sums."""
    sums = [value.detach().double().sum() for value in model.state_dict().values()]
    return torch.stack(sums).view(torch.int64) if sums else torch.zeros(0, dtype=torch.int64)


def count_gradient_passes(teacher: nn.Module, counts: Tally, synthesizing: Callable[[], bool]) -> None:
    """Count what goes through the teacher with gradient: the cost of generation, the same measure for all methods.

    ``forward`` and ``features`` are entrances both; one that is called by the other is the same pass.
    """
    inside = False

    def counted(entrance: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def enter(images: Tensor) -> Any:
            nonlocal inside
            if inside:
                return entrance(images)
            if torch.is_grad_enabled() and images.requires_grad:
                if synthesizing():
                    counts.teacher_images += images.shape[0]
                    counts.generator_steps += 1
                else:
                    counts.guided_images += images.shape[0]
            inside = True
            try:
                return entrance(images)
            finally:
                inside = False

        return enter

    for name in ("forward", "features"):
        if hasattr(teacher, name):
            setattr(teacher, name, counted(getattr(teacher, name)))


def _method_facts(source: plugins.Source) -> MethodFacts:
    return MethodFacts(
        origin=source.kind,
        distribution=source.distribution,
        version=source.version,
        source_sha256=source.source_sha256(),
        confirmed=bool(source.card().get("confirmed", True)),
    )


def _on(tree: Any, device: torch.device) -> Any:
    """``tree`` with its tensors on ``device``."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _on(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_on(value, device) for value in tree)
    return tree


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
