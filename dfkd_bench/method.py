"""The contract between the runner and a method. Read this file first.

A run is one loop, and the runner owns it::

    teacher -> images -> pool -> batch -> loss -> student -> accuracy

A method writes one to four functions of it. In each round of each epoch the runner calls
``synthesize`` (student in eval mode), puts the returned images into the pool and, once the warm-up is
over, takes ``student_steps`` steps: ``student_batch`` -> ``student_loss`` -> backward -> optimiser step
-> ``after_student_step`` (student in train mode).

=====================================================  ========  ============================================
thing                                                  owner     what a method may do with it
=====================================================  ========  ============================================
teacher weights, mode, buffers                         runner    read; tap features inside a ``with``
student, its optimiser, schedule, mode                 runner    run it forward, differentiate through it
pool: storage, 8-bit truncation, passes, cap           runner    return images; read it in ``student_batch``
clock, counters, evaluation, checkpoints, seeds        runner    nothing: they are not in ``Task``
``Schedule``                                           the job   propose one in ``published`` or ``smoke``
``Config``; generators, their optimisers, banks        method    everything
=====================================================  ========  ============================================

State of a method that is neither saved (``state_dict``) nor named in ``transient`` fails ``dfkd-bench check``.

Shapes: n, b images; C, H, W channels, height, width; K classes; d width of a label-text embedding.
Images are floats in [0, 1] everywhere except in ``Batch.images``, which are normalised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dfkd_bench.augment import to_unit
from dfkd_bench.losses import kl_divergence

if TYPE_CHECKING:
    from dfkd_bench.ahead import Images
    from dfkd_bench.augment import Normalize
    from dfkd_bench.shuffle import Shuffle

Origin = Literal["paper", "code", "third-party", "transferred", "ours"]
"""Where a set of hyper-parameters comes from. ``transferred``: a published set for another cell, used unchanged."""

Need = Literal["batchnorm", "label_text", "unlabelled", "initial_images", "training_data"]
"""What a method asks of its task.

``batchnorm``: a teacher with BatchNorm2d layers. ``label_text``: label-text embeddings; the ``Config`` has ``encoder``
and ``prompt``. ``unlabelled``: images of another data set or folder; the ``Config`` has ``pool``. ``initial_images``:
images to begin with; the ``Config`` has ``initial_images``, a folder or None. ``training_data``: controls only.
"""


class Classifier(Protocol):
    """A teacher or a student: every model of ``dfkd_bench.models`` has this form (and is an ``nn.Module``)."""

    classifier: nn.Linear

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [b, K] of normalised images [b, C, H, W]."""
        ...

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], penultimate features [b, F] and the outputs of the stages [b, C_i, H_i, W_i]."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """Real images, lent to controls: uint8 [n, C, H, W], read-only, and int64 labels [n] on the task's device.

    Images that the device can't hold stay in host memory; batches come to the device either way.
    """

    images: Images  # ``images[rows]`` are on the device
    labels: Tensor

    def draw(self, shuffle: Shuffle, size: int) -> tuple[Tensor, Tensor]:
        """The next ``size`` images, float32 [b, C, H, W] in [0, 1], and labels that ``shuffle`` deals."""
        count = len(self.labels)
        if isinstance(self.images, Tensor):
            rows = shuffle.next(count, size)
            return to_unit(self.images[rows]), self.labels[rows]
        shuffle.move(torch.device("cpu"))
        rows = shuffle.next(count, size)
        images = self.images.take(rows, shuffle.ahead(count, size))
        return to_unit(images), self.labels[rows.to(self.labels.device)]


@dataclass(frozen=True)
class Task:
    """What a method gets to see. No path to data, no test images, no clock."""

    teacher: Any  # Classifier and nn.Module: eval mode, frozen, plain; gradients flow through it to images
    teach: Callable[[Tensor], Tensor]  # normalised images -> logits, no gradient; the fast path of the teacher
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # C, H, W
    device: torch.device
    normalize: Normalize  # [0, 1] -> the teacher's input space; .inverse, .mean, .std
    augment: Callable[[Tensor], Tensor]  # the data set's training augmentation, per image, differentiable, in [0, 1]
    flip_keeps_class: bool  # a fact of the data set (not so for digits and letters)
    crop_padding: int  # pixels, H/8: the padding of the random crop
    rng: torch.Generator  # a stream of the method's own on ``device``; torch's global stream may be used, too
    label_embeddings: Callable[[str, str], Tensor]  # (encoder, prompt) -> float32 [K, d], constant
    # Lent only to methods that name them in ``needs``:
    training_data: LabelledImages | None = None
    unlabelled: Tensor | None = None  # uint8 [n, C, H, W]
    initial_images: Tensor | None = None  # uint8 [n, C, H, W]


@dataclass(frozen=True)
class Progress:
    """Where in the run a call happens. All indices count from 0."""

    epoch: int
    round: int
    epochs: int
    warmup_epochs: int

    @property
    def warming_up(self) -> bool:
        """True while the student is not trained yet."""
        return self.epoch < self.warmup_epochs


@dataclass(frozen=True)
class Synthesis:
    """What ``synthesize`` hands back. ``images`` None: this method keeps no pool (it overrides ``student_batch``)."""

    images: Tensor | None  # float [n, C, H, W] in [0, 1], detached; un-augmented, un-normalised
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # rows [n, ...] the pool keeps beside the images
    scalars: Mapping[str, Tensor] = field(default_factory=dict)  # 0-d tensors, still on the device: no ``.item()``


@dataclass(frozen=True)
class Batch:
    """A student batch. ``parts`` names row ranges (fresh, replay, ...), ``extras`` holds tensors with b rows."""

    images: Tensor  # normalised [b, C, H, W], no graph
    parts: Mapping[str, slice] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class PoolView(Protocol):
    """The pool as a method sees it: images made so far, drawn without replacement, pass after pass."""

    def __len__(self) -> int: ...

    def draw(self, size: int) -> Tensor:
        """Up to ``size`` images, float [b, C, H, W] in [0, 1]; the last batch of a pass may be shorter."""
        ...

    def draw_with_extras(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, with the extras' rows of the same images."""
        ...


class Frozen(BaseModel):
    """Base of the values that pass between the rooms: immutable, unknown keys and NaN refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Schedule(Frozen):
    """The student's training: proposed by a method, decided by the job."""

    epochs: int = Field(ge=1, le=100_000, description="epochs, warm-up included")
    warmup_epochs: int = Field(0, ge=0, description="first epochs that only synthesise")
    rounds_per_epoch: int = Field(1, ge=1, description="synthesis and student phases alternate this often an epoch")
    student_steps: int = Field(ge=1, description="student steps a round")
    batch_size: int = Field(ge=2, description="images a student step")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="the student's optimiser")
    lr: float = Field(gt=0, description="initial learning rate of the student")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(1e-4, ge=0, description="on all parameters, BatchNorm included")
    lr_rule: Literal["cosine", "multistep", "constant"] = Field("cosine", description="how the learning rate falls")
    lr_horizon: int | None = Field(None, ge=1, description="cosine period [epochs]; None: the epochs after the warm-up")
    lr_min: float = Field(0.0, ge=0, description="floor of the cosine")
    lr_milestones: tuple[int, ...] = Field((), description="multistep: epochs after the warm-up")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="multistep: factor at each milestone")
    clip_norm: float | None = Field(None, gt=0, description="gradient norm is clipped to this")
    pool_cap: int | None = Field(None, ge=2, description="images kept in the pool, the newest; None: all")

    def model_post_init(self, _context: Any) -> None:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be smaller than epochs ({self.epochs})")

    @property
    def rounds(self) -> int:
        """Calls of ``synthesize`` in a whole run."""
        return self.epochs * self.rounds_per_epoch

    @property
    def total_student_steps(self) -> int:
        """Student steps of a whole run."""
        return (self.epochs - self.warmup_epochs) * self.rounds_per_epoch * self.student_steps


class Published(Frozen):
    """A set of hyper-parameters for one data set or one pair, with its origin."""

    schedule: Schedule
    config: dict[str, Any] = {}
    origin: Origin
    source: str = Field(min_length=4, description="document, section or file")


class MethodConfig(Frozen):
    """Base of every method's ``Config``: frozen, typed, bounded, unknown keys refused."""

    temperature: float = Field(20.0, gt=0, le=1000, description="T of the student's KL divergence")


class Method(ABC):
    """One data-free distillation method. Subclasses write ``synthesize`` and, if they must, the rest.

    ``__init__`` builds networks and optimisers on ``task.device``; it must not use ``student`` (there is none yet).
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    needs: ClassVar[frozenset[Need]] = frozenset()
    published: ClassVar[Mapping[str, Published]] = {}  # "cifar10" or "cifar10/wrn40_2:wrn16_1" -> protocol `paper`
    smoke: ClassVar[Mapping[str, Published]] = {}  # "digits" -> protocol `smoke`: minutes on a CPU, ours
    search: ClassVar[Mapping[str, Sequence[Any]]] = {}  # setting -> values tried when `smoke` settings are chosen
    absorbs: ClassVar[str] = ""  # protocol `equal`: the setting that takes up the generation budget; "": makes nothing
    described: ClassVar[Mapping[str, Any]] = {}  # protocol `equal`: what authors describe where their code differs
    equal_lr: ClassVar[Mapping[str, float]] = {}  # protocol `equal`: "digits" -> the learning rate chosen on validation
    same_results: ClassVar[
        Sequence[str]
    ] = ()  # hashes of earlier sources with the same results (docs/adding_a_method.md)
    tiny: ClassVar[Mapping[str, Any]] = {}  # settings that make a call take milliseconds, for the conformance checks
    quirks: ClassVar[Mapping[str, str]] = {}  # conformance check -> why this method, faithfully, breaks it
    transient: ClassVar[frozenset[str]] = frozenset()  # attributes that need not survive a resume

    def __init__(self, config: Any, task: Task) -> None:
        self.config = config
        self.task = task

    @abstractmethod
    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        """Make images. The student is in eval mode; nothing of it may change; gradients may flow through it."""

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """The next student batch of (up to) ``size`` images; no graph. Default: drawn from the pool, augmented."""
        return Batch(self.task.normalize(self.task.augment(pool.draw(size))))

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """The 0-d loss of one student step. Default: KL(teacher || student) at ``config.temperature``, times T^2."""
        return kl_divergence(student(batch.images), self.task.teach(batch.images), self.config.temperature)

    def after_student_step(self, student: nn.Module, batch: Batch, at: Progress) -> None:
        """After the student's optimiser step, e.g. for a method's own heads or replay buffers. Default: nothing."""
        return

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. Default: every attribute except ``config``, ``task`` and the transient ones."""
        return {name: _saved(self, name, value) for name, value in self._state_attributes()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``, called on a freshly built method."""
        expected = {name for name, _ in self._state_attributes()}
        if expected != set(state):
            raise ValueError(f"saved state has {sorted(state)}, the method has {sorted(expected)}")
        for name, value in state.items():
            current = getattr(self, name)
            if hasattr(current, "load_state_dict"):
                current.load_state_dict(value)
            else:
                setattr(self, name, value)

    def _state_attributes(self) -> list[tuple[str, Any]]:
        skipped = {"config", "task"} | self.transient
        return [(name, value) for name, value in sorted(vars(self).items()) if name not in skipped]

    @classmethod
    def unsupported(cls, config: Any, task: Task) -> str | None:
        """A reason why this task can't be done with this configuration, which becomes a row; None if it can."""
        return None

    @classmethod
    def reads_label_text(cls, config: Any) -> bool:
        """Whether a run with this configuration reads label-text embeddings; they are made before it."""
        return "label_text" in cls.needs

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        """Images that ``synthesize`` passes through the teacher with gradient in a whole run. `dfkd-bench check`
        compares it with what the runner counts; protocol `equal` chooses the setting ``absorbs`` by it."""
        return 0

    @classmethod
    def batch_rows(cls, config: Any, size: int) -> int:
        """Rows of a student batch that was asked for with ``size``: more if replayed images or pairs come on top."""
        return size

    @classmethod
    def outside_knowledge(cls, config: Any) -> str | None:
        """What the run knows beside the teacher, if that depends on the settings; None: what the ``CARD`` says."""
        return None


_PLAIN = (bool, int, float, str, type(None))


def _saved(method: Method, name: str, value: Any) -> Any:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return value.state_dict()
    if _is_plain(value):
        return value
    raise TypeError(
        f"{type(method).__name__}.{name} ({type(value).__name__}) can't be saved: give it state_dict() and "
        "load_state_dict(), make it tensors and plain values, or name it in `transient`"
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (Tensor, *_PLAIN))
