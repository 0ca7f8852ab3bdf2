"""Conformance: small named checks that every method has to pass, built in or not.

Each check is a function ``check(subject)`` whose docstring says in one line what holds; it raises ``Broken`` with one
line that says what doesn't. The checks about behaviour play the runner's loop with a random teacher, a random student
and the method's ``tiny`` settings, so that all of them together take seconds on one core.

A method that breaks a check for a good reason, such as a released behaviour that made published numbers, declares it
in ``quirks``: check name -> reason. That is strict: a declared break that doesn't happen fails, too.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_bench import record, run, teachers
from dfkd_bench.augment import Normalize, random_crop_flip
from dfkd_bench.checkpoint import load_tree, random_state, restore_random_state, save_tree, seed_everything
from dfkd_bench.compute import Compute
from dfkd_bench.data import DataSet, Part, RawData
from dfkd_bench.job import Job, Recipe, TeacherSpec
from dfkd_bench.method import (
    Batch,
    LabelledImages,
    Method,
    MethodConfig,
    Need,
    Progress,
    Published,
    Schedule,
    Synthesis,
    Task,
)
from dfkd_bench.models import build_model
from dfkd_bench.optimise import build_optimizer
from dfkd_bench.paths import HOME_VARIABLE, home
from dfkd_bench.pool import Pool
from dfkd_bench.watch import FileWatch

if TYPE_CHECKING:
    from dfkd_bench.plugins import Source

CPU = torch.device("cpu")
EPOCHS, WARMUP, STEPS = 4, 1, 2
SCHEDULE = Schedule(epochs=EPOCHS, warmup_epochs=WARMUP, student_steps=STEPS, batch_size=8, lr=0.05)
CARD_KEYS: dict[str, tuple[type, ...]] = {
    "title": (str,),
    "family": (str,),
    "year": (int, type(None)),
    "venue": (str,),
    "confirmed": (bool,),
    "knowledge": (str,),
}


class Broken(Exception):
    """A check does not hold; the message is one line."""


@dataclass(frozen=True)
class Outcome:
    """What one check came to. ``detail``: one line, what holds or what broke. ``declared``: it is one of ``quirks``."""

    name: str
    passed: bool
    detail: str
    declared: bool


@dataclass(frozen=True)
class Case:
    """The size of a task."""

    num_classes: int
    image_shape: tuple[int, int, int]
    teacher: str = "convnet8"


SMALL = Case(4, (1, 8, 8))
LARGE = Case(5, (3, 32, 32), "wrn16_1")


@dataclass(frozen=True)
class Subject:
    """The method under test."""

    source: Source
    method_class: type[Method]

    @property
    def is_control(self) -> bool:
        """Controls may see training data and need no paper."""
        return self.source.card().get("family") == "control"

    def tiny(self) -> Any:
        """The configuration of all checks of behaviour."""
        return self.method_class.Config(**self.method_class.tiny)

    def bench(self, case: Case | None = None) -> Bench:
        """Everything the runner would build; ``case`` None: the smallest one that the method supports."""
        if case is not None:
            return Bench(self, case)
        reason = None
        for smallest in (SMALL, LARGE):
            bench = Bench(self, smallest)
            reason = bench.unsupported()
            if reason is None:
                return bench
        raise Broken(f"the method supports neither 8x8 nor 32x32 images: {reason}")


def check_names() -> tuple[str, ...]:
    """All checks, in the order in which they are run."""
    return tuple(check.__name__ for check in CHECKS)


def run_checks(source: Source, method_class: type[Method]) -> Iterator[Outcome]:
    """Run every check on one method. Nothing a method raises gets out: it becomes a failed outcome."""
    subject = Subject(source, method_class)
    for check in CHECKS:
        yield _outcome(check, subject)


def _outcome(check: Callable[[Subject], None], subject: Subject) -> Outcome:
    name, holds = check.__name__, (check.__doc__ or "").strip()
    reason = subject.method_class.quirks.get(name)
    declared = reason is not None
    try:
        with _undisturbed():
            check(subject)
    except Broken as broken:
        detail = _one_line(str(broken))
        return Outcome(
            name, declared, f"declared: {_one_line(str(reason))} ({detail})" if declared else detail, declared
        )
    except Exception as error:  # a method may raise anything
        return Outcome(name, False, _named(error), declared)
    if declared:
        return Outcome(name, False, f"declared quirk did not happen: {holds}", True)
    return Outcome(name, True, holds, False)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random streams, threads and the home folder are afterwards what they were before."""
    state, threads, place = random_state(CPU), torch.get_num_threads(), os.environ.get(HOME_VARIABLE)
    try:
        yield
    finally:
        restore_random_state(state, CPU)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if place is None:
            os.environ.pop(HOME_VARIABLE, None)
        else:
            os.environ[HOME_VARIABLE] = place


# --- The runner's loop in small ---------------------------------------------------------------------------------------


@dataclass
class Played:
    """What a method handed over, as it did, and bit-exact copies of it in order."""

    syntheses: list[Synthesis] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    trace: list[tuple[str, Tensor]] = field(default_factory=list)

    def note(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Keep copies."""
        self.trace += [(f"{key} of {name}", value.detach().clone()) for key, value in values.items()]


Around = Callable[[str], AbstractContextManager[None]]


def _nothing_around(_call: str) -> AbstractContextManager[None]:
    return nullcontext()


class Bench:
    """A random teacher, a random student, the pool and the method's task. The method is built by ``play``."""

    def __init__(self, subject: Subject, case: Case) -> None:
        self.subject, self.case = subject, case
        self.config = subject.tiny()
        self.streams = {
            name: torch.Generator(CPU).manual_seed(run.stream_seed(0, name)) for name in ("pool", "augment", "method")
        }
        self.teacher = copy.deepcopy(_teacher(case))
        seed_everything(run.stream_seed(0, "student"))
        self.student = Compute(CPU).place(build_model("convnet8", case.num_classes, case.image_shape[0]))
        self.optimizer = build_optimizer(self.student.parameters(), SCHEDULE)
        self.pool = Pool(case.image_shape, CPU, self.streams["pool"])
        self.task = self._task()
        self.method: Method | None = None

    def unsupported(self) -> str | None:
        """The method's reason why it can't do this task."""
        return self.subject.method_class.unsupported(self.config, self.task)

    def build(self, around: Around = _nothing_around) -> Method:
        """The method, built as the runner does it."""
        if self.method is None:
            seed_everything(run.stream_seed(0, "global"))
            with around("__init__"):
                self.method = self.subject.method_class(self.config, self.task)
        return self.method

    def play(self, epochs: Iterable[int] = (0, 1, 2), around: Around = _nothing_around) -> Played:
        """Some epochs of the runner's loop; ``around(call)`` is entered for each call of the method."""
        method, student, played = self.build(around), self.student, Played()
        for epoch in epochs:
            at = Progress(epoch, 0, EPOCHS, WARMUP)
            made = self.synthesize(epoch, around)
            played.syntheses.append(made)
            if made.images is not None:
                self.pool.add(made.images, made.extras)
                played.note(f"epoch {epoch}", {"images": made.images, **made.extras})
            student.train().requires_grad_(True)
            for step in range(0 if at.warming_up else STEPS):
                with around("student_batch"):
                    batch = method.student_batch(self.pool, SCHEDULE.batch_size, at)
                played.batches.append(batch)
                with around("student_loss"):
                    loss = method.student_loss(student, batch, at)
                played.losses.append(loss)
                played.note(
                    f"step {step}, epoch {epoch}", {"student batch": batch.images, **batch.extras, "student loss": loss}
                )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                with around("after_student_step"):
                    method.after_student_step(student, batch, at)
        return played

    def synthesize(self, epoch: int, around: Around = _nothing_around) -> Synthesis:
        """The images of one epoch; the pool does not get them."""
        method = self.build(around)
        self.student.eval().requires_grad_(False)
        with around("synthesize"):
            return method.synthesize(self.student, Progress(epoch, 0, EPOCHS, WARMUP))

    def saved(self) -> dict[str, Any]:
        """What the runner's checkpoint holds."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.build().state_dict(),
            "random": random_state(CPU),
            "streams": {name: stream.get_state() for name, stream in self.streams.items()},
            "pool": [self.pool.state_dict(), self.pool.images, self.pool.extras],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from ``saved`` with a freshly built method, as a resumed run does."""
        method = self.build()
        self.student.load_state_dict(saved["student"])
        self.optimizer.load_state_dict(saved["optimizer"])
        method.load_state_dict(saved["method"])
        for name, stream in self.streams.items():
            stream.set_state(saved["streams"][name])
        self.pool.load_state_dict(*saved["pool"])
        restore_random_state(saved["random"], CPU)

    def _task(self) -> Task:
        case, needs = self.case, self.subject.method_class.needs
        channels, side, _ = case.image_shape
        labels = torch.arange(64) % case.num_classes
        images = _noise(64, case.image_shape)
        normalize = Normalize([0.4] * channels, [0.3] * channels)
        return Task(
            teacher=self.teacher,
            teach=torch.no_grad()(self.teacher),
            num_classes=case.num_classes,
            class_names=tuple(f"class {index}" for index in range(case.num_classes)),
            image_shape=case.image_shape,
            device=CPU,
            normalize=normalize,
            augment=lambda images: random_crop_flip(images, side // 8, True, self.streams["augment"]),
            flip_keeps_class=True,
            crop_padding=side // 8,
            rng=self.streams["method"],
            label_embeddings=lambda _encoder, _prompt: torch.randn(
                case.num_classes, 16, generator=torch.Generator().manual_seed(2)
            ),
            training_data=LabelledImages(images, labels) if "training_data" in needs else None,
            unlabelled=images if "unlabelled" in needs else None,
            initial_images=images if "initial_images" in needs else None,
        )


def _noise(count: int, image_shape: tuple[int, int, int], seed: int = 1) -> Tensor:
    return torch.randint(256, (count, *image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _teacher(case: Case) -> nn.Module:
    """Random weights; BatchNorm statistics of random images, so that they are not the trivial 0 and 1."""
    seed_everything(0)
    channels = case.image_shape[0]
    model = Compute(CPU).place(build_model(case.teacher, case.num_classes, channels))
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, *case.image_shape))
    return model.eval().requires_grad_(False)


# --- Comparing --------------------------------------------------------------------------------------------------------

Look = Callable[[Bench], dict[str, Any]]
ALL_CALLS = ("__init__", "synthesize", "student_batch", "student_loss", "after_student_step")


def _unchanged(subject: Subject, what: str, look: Look, calls: tuple[str, ...] = ALL_CALLS) -> None:
    """Play, and compare what ``look`` sees before and after each of ``calls``."""
    bench = subject.bench()

    @contextmanager
    def around(call: str) -> Iterator[None]:
        before = look(bench)
        yield
        if call in calls:
            after = look(bench)
            for name in {**before, **after}:
                if name not in before or name not in after or not _same(before[name], after[name]):
                    raise Broken(f"`{call}` changed the {what} {name}")

    bench.play(around=around)


def _same(one: Any, other: Any) -> bool:
    """Bit for bit, NaN included."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(type(one) is type(other) and one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))


def _same_traces(one: Played, other: Played, otherwise: str) -> None:
    for (name, first), (_, second) in zip(one.trace, other.trace, strict=False):
        if not _same(first, second):
            raise Broken(f"{otherwise}: {name} differ" if name.startswith("images") else f"{otherwise}: {name} differs")
    if len(one.trace) != len(other.trace):
        raise Broken(f"{otherwise}: {len(one.trace)} results, then {len(other.trace)}")


def _state(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _modes(model: nn.Module) -> dict[str, Any]:
    return {f"mode of {name or 'the whole'}": module.training for name, module in model.named_modules()}


def _gradients(model: nn.Module) -> dict[str, Any]:
    return {
        f"{part} of {name}": value
        for name, parameter in model.named_parameters()
        for part, value in (
            ("requires_grad", parameter.requires_grad),
            ("gradient", None if parameter.grad is None else parameter.grad.clone()),
        )
    }


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _hooks(model: nn.Module) -> dict[str, Any]:
    counts = {
        f"hooks of {name or 'the whole'}": sum(len(getattr(module, kind, None) or ()) for kind in _HOOKS)
        for name, module in model.named_modules()
    }
    for name, parameter in model.named_parameters():
        counts[f"hooks of {name}"] = len(parameter._backward_hooks or ())
    return counts


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _named(error: BaseException) -> str:
    """``Type: message`` on one line; of pydantic's long messages the first problem."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# --- Checks of the file -----------------------------------------------------------------------------------------------


def config_default_constructible(subject: Subject) -> None:
    """`Config` is a MethodConfig and every setting has a default."""
    if not issubclass(subject.method_class.Config, MethodConfig):
        raise Broken("`Config` is no subclass of dfkd_bench.method.MethodConfig")
    required = [name for name, setting in subject.method_class.Config.model_fields.items() if setting.is_required()]
    if required:
        raise Broken(f"no default: {', '.join(required)}")
    subject.method_class.Config()


def config_frozen(subject: Subject) -> None:
    """A setting can't be changed once the configuration is built."""
    config = subject.tiny()
    for name in type(config).model_fields:
        try:
            setattr(config, name, getattr(config, name))
        except ValidationError:
            continue
        raise Broken(f"`{name}` can be assigned to: build `Config` on MethodConfig and leave its `frozen` alone")


def config_json_round_trip(subject: Subject) -> None:
    """Default and tiny settings come back equal from JSON, and are within their own bounds."""
    for config in (subject.method_class.Config(), subject.tiny()):
        back = type(config)(**json.loads(config.model_dump_json()))
        for name in type(config).model_fields:
            if getattr(back, name) != getattr(config, name):
                raise Broken(f"`{name}` is {getattr(config, name)!r} before and {getattr(back, name)!r} after JSON")


def unknown_setting_refused(subject: Subject) -> None:
    """A misspelt setting is an error."""
    try:
        subject.method_class.Config.model_validate({"no_such_setting": 1})
    except ValidationError:
        return
    raise Broken("`Config(no_such_setting=1)` is accepted: build `Config` on MethodConfig and leave its `extra` alone")


def settings_described(subject: Subject) -> None:
    """Every setting has a description."""
    fields = subject.method_class.Config.model_fields
    bare = [name for name, setting in fields.items() if not (setting.description or "").strip()]
    if bare:
        raise Broken(f"no description: {', '.join(bare)}")


def settings_are_not_the_schedules(subject: Subject) -> None:
    """No setting has the name of one of the schedule's, which `-s` would then not reach."""
    both = [name for name in subject.method_class.Config.model_fields if name in Schedule.model_fields]
    if both:
        raise Broken(f"the schedule has these, too: {', '.join(both)}")


def own_settings_parse(subject: Subject) -> None:
    """`published` and `smoke` settings are valid, their keys DATASET or DATASET/TEACHER:STUDENT."""
    cls = subject.method_class
    try:
        cls.Config(**cls.described)
    except ValidationError as error:
        raise Broken(f"described: {_named(error)}") from None
    for table, entries in (("published", cls.published), ("smoke", cls.smoke)):
        for key, entry in entries.items():
            if not re.fullmatch(r"[^/:]+(/[^/:]+:[^/:]+)?", key):
                raise Broken(f"{table}['{key}']: expected a data set or DATASET/TEACHER:STUDENT")
            if not isinstance(entry, Published):
                raise Broken(f"{table}['{key}'] is a {type(entry).__name__}, no dfkd_bench.method.Published")
            try:
                cls.Config(**entry.config)
            except ValidationError as error:
                raise Broken(f"{table}['{key}']: {_named(error)}") from None


def card_complete(subject: Subject) -> None:
    """The file has a literal `CARD` with title, family, year, venue, confirmed and knowledge."""
    card = subject.source.card()
    if not card:
        raise Broken("no literal `CARD = {...}` can be read from the method's file")
    for name, types in CARD_KEYS.items():
        kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
        if name not in card:
            raise Broken(f"`CARD` has no '{name}' ({kinds})")
        if type(card[name]) not in types:
            raise Broken(f"`CARD['{name}']` is {card[name]!r}, expected {kinds}")
        if name in ("title", "family", "knowledge") and not card[name]:
            raise Broken(f"`CARD['{name}']` is empty")


def docstring_link(subject: Subject) -> None:
    """The file's docstring links to the paper (controls need none)."""
    if not subject.is_control and not re.search(r"https?://\S+\.\S+", _docstring(subject)):
        raise Broken("the file's docstring has no http link")


def docstring_differences(subject: Subject) -> None:
    """The file's docstring lists the differences from the paper and from the released code."""
    for other in ("paper", "released code"):
        if not re.search(rf"^Differences from the {other}\n+1\. \S", _docstring(subject), re.MULTILINE):
            raise Broken(f"the file's docstring has no line 'Differences from the {other}' followed by '1. ...'")


def _docstring(subject: Subject) -> str:
    module = sys.modules.get(subject.method_class.__module__)
    return getattr(module, "__doc__", None) or ""


def needs_known(subject: Subject) -> None:
    """`needs` names only what the runner can lend."""
    for need in sorted(subject.method_class.needs):
        if need not in get_args(Need):
            raise Broken(f"`needs` has '{need}'; known: {', '.join(get_args(Need))}")


def training_data_for_controls_only(subject: Subject) -> None:
    """Only a control asks for training data."""
    if "training_data" in subject.method_class.needs and not subject.is_control:
        raise Broken("`needs` has 'training_data', but the family in `CARD` is not 'control'")


def quirks_known(subject: Subject) -> None:
    """Every quirk names a check and gives a reason."""
    for name, reason in subject.method_class.quirks.items():
        if name not in check_names():
            raise Broken(f"`quirks` names '{name}', which is no check")
        if not reason.strip():
            raise Broken(f"quirk '{name}' gives no reason")


# --- Checks of the images ---------------------------------------------------------------------------------------------


def images_shape(subject: Subject) -> None:
    """`synthesize` returns floating-point images [n, C, H, W], or None."""
    bench = subject.bench()
    for epoch in range(WARMUP + 1):  # without the pool, which would refuse a wrong shape first
        made = bench.synthesize(epoch)
        if not isinstance(made, Synthesis):
            raise Broken(f"`synthesize` returned a {type(made).__name__}, expected a dfkd_bench.method.Synthesis")
        images, wanted = made.images, bench.case.image_shape
        if images is None:
            continue
        if images.ndim != 4 or images.shape[0] < 1 or images.shape[1:] != wanted:
            raise Broken(f"images have shape {list(images.shape)}, expected [n, {', '.join(map(str, wanted))}]")
        if not images.is_floating_point():
            raise Broken(f"images are {images.dtype}, expected floats in [0, 1]")


def images_finite(subject: Subject) -> None:
    """No image has NaN or infinite pixels."""
    for images in _images(subject):
        if not torch.isfinite(images).all():
            raise Broken("images have NaN or infinite pixels")


def images_in_range(subject: Subject) -> None:
    """Pixels lie in [0, 1]."""
    for images in _images(subject):
        finite = images[torch.isfinite(images)]
        if finite.numel() and (finite.min() < 0 or finite.max() > 1):
            raise Broken(f"pixels lie in [{finite.min().item():.3g}, {finite.max().item():.3g}], expected [0, 1]")


def images_detached(subject: Subject) -> None:
    """Images and their extras carry no graph."""
    for made in subject.bench().play().syntheses:
        kept = {} if made.images is None else {"images": made.images}
        for name, value in {**kept, **made.extras}.items():
            if value.requires_grad:
                raise Broken(f"`{name}` of the synthesis still has a graph: return them detached")


def extras_have_rows(subject: Subject) -> None:
    """Every extra of a synthesis or of a batch has one row for each image."""
    bench = subject.bench()
    for epoch in range(WARMUP + 1):  # without the pool, which would refuse them first
        made = bench.synthesize(epoch)
        _same_rows("synthesis", made.images, made.extras)
    for batch in subject.bench().play().batches:
        _same_rows("student batch", batch.images, batch.extras)


def _same_rows(where: str, images: Tensor | None, extras: Mapping[str, Tensor]) -> None:
    rows = 0 if images is None else images.shape[0]
    for name, value in extras.items():
        if value.ndim == 0 or value.shape[0] != rows:
            raise Broken(f"extra '{name}' of a {where} has shape {list(value.shape)}, expected {rows} rows")


def scalars_are_tensors(subject: Subject) -> None:
    """`scalars` are 0-d tensors: reading them out would wait for the device."""
    for made in subject.bench().play().syntheses:
        for name, value in made.scalars.items():
            if not isinstance(value, Tensor) or value.ndim:
                raise Broken(f"scalar '{name}' is no 0-d tensor")


def _images(subject: Subject) -> Iterator[Tensor]:
    for made in subject.bench().play().syntheses:
        if made.images is not None:
            yield made.images


# --- Checks of what is the runner's -----------------------------------------------------------------------------------


def teacher_unchanged(subject: Subject) -> None:
    """The teacher's weights and buffers stay as they are."""
    _unchanged(subject, "teacher's", lambda bench: _state(bench.teacher))


def teacher_mode_unchanged(subject: Subject) -> None:
    """The teacher stays in eval mode."""
    _unchanged(subject, "teacher's", lambda bench: _modes(bench.teacher))


def teacher_stays_frozen(subject: Subject) -> None:
    """The teacher's parameters need no gradient and get none."""
    bench = subject.bench()
    before = _gradients(bench.teacher)
    bench.play()
    for name, value in _gradients(bench.teacher).items():
        if name not in before or not _same(before[name], value):
            raise Broken(f"the teacher's {name} was changed")


def student_unchanged_by_synthesis(subject: Subject) -> None:
    """`synthesize` leaves the student's weights, buffers and mode as they are."""
    _unchanged(
        subject, "student's", lambda bench: {**_state(bench.student), **_modes(bench.student)}, calls=("synthesize",)
    )


def no_gradients_left_on_student(subject: Subject) -> None:
    """`synthesize` leaves no gradient on the student."""
    _unchanged(subject, "student's", lambda bench: _gradients(bench.student), calls=("synthesize",))


def student_trained_by_runner_only(subject: Subject) -> None:
    """The methods of the student's steps leave its weights to the runner's optimiser."""
    _unchanged(
        subject,
        "student's",
        lambda bench: {name: value.detach().clone() for name, value in bench.student.named_parameters()},
        calls=("student_batch", "student_loss", "after_student_step"),
    )


def no_hooks_left(subject: Subject) -> None:
    """No hook stays on teacher or student after a call."""
    _unchanged(
        subject,
        "",
        lambda bench: {
            f"{owner}'s {name}": count
            for owner, model in (("teacher", bench.teacher), ("student", bench.student))
            for name, count in _hooks(model).items()
        },
    )


def seeds_left_alone(subject: Subject) -> None:
    """Neither torch's global stream nor the task's is seeded anew."""
    _unchanged(
        subject,
        "seed of",
        lambda bench: {"torch": torch.initial_seed(), "task.rng": bench.task.rng.initial_seed()},
    )


def no_data_file_opened(subject: Subject) -> None:
    """No data file is opened while the method runs."""
    watch = FileWatch([home() / "data"])

    def around(_call: str) -> AbstractContextManager[None]:
        return watch.method()

    bench = subject.bench()
    with watch.on():
        bench.play(around=around)
    opened = [path for path, phase in watch.files if phase == "method"]
    if opened:
        raise Broken(f"the method opened {opened[0]}")


def generation_cost_is_counted(subject: Subject) -> None:
    """`generation_cost` is what the runner counts, and `absorbs` names a whole-number setting that it grows with."""
    bench, method_class, tally, synthesizing = subject.bench(), subject.method_class, run.Tally(), False

    @contextmanager
    def around(call: str) -> Iterator[None]:
        nonlocal synthesizing
        synthesizing = call == "synthesize"
        yield
        synthesizing = False

    run.count_gradient_passes(bench.teacher, tally, lambda: synthesizing)
    bench.play(range(EPOCHS), around)
    said = method_class.generation_cost(bench.config, SCHEDULE, bench.case.num_classes)
    if said != tally.teacher_images:
        raise Broken(
            f"synthesis passed {tally.teacher_images} images through the teacher, `generation_cost` says {said}"
        )
    if not method_class.absorbs:
        if said:
            raise Broken("synthesis uses the teacher's gradient, but `absorbs` names no setting that scales that")
        return
    value = getattr(bench.config, method_class.absorbs, None)
    if not isinstance(value, int):
        raise Broken(f"`absorbs` names '{method_class.absorbs}', which is no whole-number setting")
    more = method_class.Config(**{**bench.config.model_dump(), method_class.absorbs: 2 * value})
    if method_class.generation_cost(more, SCHEDULE, bench.case.num_classes) <= said:
        raise Broken(f"the generation cost doesn't grow with '{method_class.absorbs}'")


# --- Checks of the student's steps ------------------------------------------------------------------------------------


def student_batch_size(subject: Subject) -> None:
    """A student batch has 1 to the asked number of images [b, C, H, W]; more only if `parts` names them."""
    bench = subject.bench()
    for batch in bench.play().batches:
        shape, wanted = list(batch.images.shape), SCHEDULE.batch_size
        if batch.images.ndim != 4 or tuple(shape[1:]) != bench.case.image_shape:
            raise Broken(f"a student batch has shape {shape}, the task's images {list(bench.case.image_shape)}")
        named = {row for part in batch.parts.values() for row in range(shape[0])[part]}
        if not 1 <= shape[0] <= wanted and len(named) != shape[0]:
            raise Broken(f"a student batch has {shape[0]} rows, {wanted} were asked for and `parts` doesn't name them")


def batch_rows_are_right(subject: Subject) -> None:
    """`batch_rows` says how many rows a full student batch has."""
    bench = subject.bench()
    most = max(batch.images.shape[0] for batch in bench.play().batches)
    said = subject.method_class.batch_rows(bench.config, SCHEDULE.batch_size)
    if most != said:
        raise Broken(f"full student batches have {most} rows, `batch_rows` says {said}")


def student_batch_range(subject: Subject) -> None:
    """A student batch is normalised: put back, its pixels lie in [0, 1]."""
    bench = subject.bench()
    for batch in bench.play().batches:
        pixels = bench.task.normalize.inverse(batch.images)
        if not (torch.isfinite(pixels).all() and pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
            raise Broken(
                f"pixels of a student batch lie in [{pixels.min().item():.3g}, {pixels.max().item():.3g}] once "
                "`task.normalize` is undone, expected [0, 1]"
            )


def student_batch_detached(subject: Subject) -> None:
    """A student batch carries no graph."""
    if any(batch.images.requires_grad for batch in subject.bench().play().batches):
        raise Broken("the images of a student batch have a graph: detach them")


def student_loss_finite(subject: Subject) -> None:
    """The student's loss is one finite number."""
    for loss in subject.bench().play().losses:
        if loss.ndim or not torch.isfinite(loss):
            raise Broken(f"the student's loss has shape {list(loss.shape)} or is not finite")


def student_loss_reaches_the_student(subject: Subject) -> None:
    """The gradient of the student's loss reaches every parameter of the student."""
    bench = subject.bench()
    bench.play()
    gradients = {name: parameter.grad for name, parameter in bench.student.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise Broken(f"no gradient reaches {', '.join(missing[:3])}")
    if not any(bool(gradient.any()) for gradient in gradients.values() if gradient is not None):
        raise Broken("the gradient is zero for every parameter of the student")


# --- Checks of whole runs ---------------------------------------------------------------------------------------------


def same_seed_same_bits(subject: Subject) -> None:
    """Two runs with one seed are equal bit for bit."""
    _same_traces(subject.bench().play(), subject.bench().play(), "of two runs with one seed")


def state_can_be_saved(subject: Subject) -> None:
    """Every attribute can be saved, or is named in `transient`."""
    bench = subject.bench()
    bench.play()
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tree(Path(folder, "state"), bench.build().state_dict())
        except TypeError as error:
            raise Broken(str(error)) from None
    unknown = sorted(subject.method_class.transient - vars(bench.build()).keys())
    if unknown:
        raise Broken(f"`transient` names attributes that aren't there: {', '.join(unknown)}")


def resumed_run_is_the_same(subject: Subject) -> None:
    """Saved and loaded into a fresh method, in the warm-up or after it, a run goes on bit for bit."""
    for done in (1, 2):
        bench, fresh = subject.bench(), subject.bench()
        bench.play(range(done))
        with tempfile.TemporaryDirectory() as folder:
            save_tree(Path(folder, "state"), bench.saved())
            saved = load_tree(Path(folder, "state"))
        uninterrupted = bench.play(range(done, EPOCHS))
        fresh.restore(saved)
        resumed = fresh.play(range(done, EPOCHS))
        _same_traces(uninterrupted, resumed, f"after a resume at epoch {done} (state neither saved nor transient?)")


def works_with_many_classes(subject: Subject) -> None:
    """It works with more classes than a synthesis has images."""
    bench = subject.bench()
    first = bench.play((0,)).syntheses[0].images
    images = 0 if first is None else first.shape[0]
    case = bench.case
    _works(subject, Case(max(20, images + 1), case.image_shape, case.teacher))


def works_at_8x8_grey(subject: Subject) -> None:
    """It works with 8x8 grey images, or says by `unsupported` why not."""
    _works(subject, SMALL)


def works_at_32x32_colour(subject: Subject) -> None:
    """It works with 32x32 colour images and a wide ResNet, or says by `unsupported` why not."""
    _works(subject, LARGE)


def _works(subject: Subject, case: Case) -> None:
    bench = subject.bench(case)
    if bench.unsupported() is not None:
        return
    try:
        played = bench.play()
    except Exception as error:
        raise Broken(f"{case.num_classes} classes, images {list(case.image_shape)}: {_named(error)}") from error
    for name, value in played.trace:
        if not torch.isfinite(value).all():
            raise Broken(f"{case.num_classes} classes, images {list(case.image_shape)}: {name} not finite")


FAKE_PLUGIN = "from dfkd_bench.check import FAKE\n\nDATASETS = {FAKE.name: FAKE}\n"


def two_epoch_run(subject: Subject) -> None:
    """A two-epoch run of the real runner on a fake data set ends in a valid record."""
    schedule = SCHEDULE.model_copy(update={"epochs": 2})
    with _temporary_home() as folder:
        plugin = folder / "fake_data.py"
        plugin.write_text(FAKE_PLUGIN)
        recipe = Recipe(epochs=1, batch_size=16, include_validation=False)
        teacher = TeacherSpec(model="convnet8", recipe=recipe)
        teachers.train(FAKE, teacher, Compute(CPU))
        job = Job(
            method=subject.source.name,
            config=subject.tiny().model_dump(mode="json"),
            schedule=schedule,
            dataset=FAKE.name,
            teacher=teacher,
            student="convnet8",
            seed=0,
            protocol="smoke",
        )
        own = subject.source.path if subject.source.kind == "file" else None
        files = (plugin,) if own is None else (plugin, own)
        result = run.run(job, run.Place(output=folder / "output", plugin_files=files, device="cpu"))
        written = record.read(record.record_path(folder / "output", job))
    if result.status == "unsupported":
        return
    if result.status != "done":
        raise Broken(f"the run failed: {result.reason}")
    if result.outcome == "not finite":
        raise Broken("the student's loss became infinite or NaN")
    if written != result:
        raise Broken("the record on disk is another one")
    if result.counters.student_steps != schedule.total_student_steps:
        raise Broken(f"{result.counters.student_steps} student steps, {schedule.total_student_steps} were planned")


@contextmanager
def _temporary_home() -> Iterator[Path]:
    """A home folder of its own; ``_undisturbed`` puts the old one back, plugins imported from it are forgotten."""
    modules = set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HOME_VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            for name in set(sys.modules) - modules:
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                    del sys.modules[name]


def _read_fake(dataset: DataSet, _root: Path, part: Part) -> RawData:
    images = _noise(64, dataset.image_shape, seed=len(part))
    return RawData.of_arrays(images.numpy(), (torch.arange(64) % dataset.num_classes).numpy())


FAKE = DataSet(
    name="conformance",
    title="random images, for the conformance checks",
    num_classes=4,
    names=("zero", "one", "two", "three"),
    image_shape=(1, 8, 8),
    mean=(0.5,),
    std=(0.29,),
    flip_keeps_class=True,
    validation_size=16,
    source="random numbers",
    read=_read_fake,
)

CHECKS: tuple[Callable[[Subject], None], ...] = (
    config_default_constructible,
    config_frozen,
    config_json_round_trip,
    unknown_setting_refused,
    settings_described,
    settings_are_not_the_schedules,
    own_settings_parse,
    card_complete,
    docstring_link,
    docstring_differences,
    needs_known,
    training_data_for_controls_only,
    quirks_known,
    images_shape,
    images_finite,
    images_in_range,
    images_detached,
    extras_have_rows,
    scalars_are_tensors,
    teacher_unchanged,
    teacher_mode_unchanged,
    teacher_stays_frozen,
    student_unchanged_by_synthesis,
    no_gradients_left_on_student,
    student_trained_by_runner_only,
    no_hooks_left,
    seeds_left_alone,
    no_data_file_opened,
    generation_cost_is_counted,
    student_batch_size,
    batch_rows_are_right,
    student_batch_range,
    student_batch_detached,
    student_loss_finite,
    student_loss_reaches_the_student,
    same_seed_same_bits,
    state_can_be_saved,
    resumed_run_is_the_same,
    works_with_many_classes,
    works_at_8x8_grey,
    works_at_32x32_colour,
    two_epoch_run,
)
