"""The method under test, and the runner's loop in small: a random teacher, a random student, ``tiny`` settings."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfkd_bench import run
from dfkd_bench.augment import Normalize, random_crop_flip
from dfkd_bench.check.broken import Broken
from dfkd_bench.checkpoint import random_state, restore_random_state, seed_everything
from dfkd_bench.compute import Compute
from dfkd_bench.method import Batch, LabelledImages, Method, Progress, Schedule, Synthesis, Task
from dfkd_bench.models import build_model
from dfkd_bench.optimise import build_optimizer
from dfkd_bench.pool import Pool

if TYPE_CHECKING:
    from dfkd_bench.plugins import Source

CPU = torch.device("cpu")
EPOCHS, WARMUP, STEPS = 4, 1, 2
SCHEDULE = Schedule(epochs=EPOCHS, warmup_epochs=WARMUP, student_steps=STEPS, batch_size=8, lr=0.05)


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
        images = noise(64, case.image_shape)
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


def noise(count: int, image_shape: tuple[int, int, int], seed: int = 1) -> Tensor:
    """Random images, uint8 [count, C, H, W]."""
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
