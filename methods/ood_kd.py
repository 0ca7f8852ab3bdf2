"""Control: knowledge distillation with real images of an unrelated data set.

Real pixels, wrong content: what distillation gets from images that nobody made for the purpose. The pool is the
user's choice and is named in the record; it is never the teacher's own data set.

Differences from the paper
1. There is no paper; all images of the pool are used, none is selected (DFND and ODSD select).

Differences from the released code
1. There is none; the schedule is that of the table's first data-free method, except where ``smoke`` has one: there it
   has the student steps and batches of all methods' own ``smoke`` settings.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from dfkd_bench.augment import to_unit
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.shuffle import Shuffle

CARD = {
    "title": "KD with real images of another data set",
    "family": "control",
    "year": None,
    "venue": "",
    "confirmed": True,
    "knowledge": "an unlabelled pool",
}


class OutOfDomainConfig(MethodConfig):
    """Which images."""

    pool: str = Field("glyphs16", description="a data set's name, or folder:PATH with any images below it")


class OutOfDomainKD(Method):
    """KL divergence to the teacher on the pool's images, augmented as in training."""

    Config = OutOfDomainConfig
    needs = frozenset({"unlabelled"})
    tiny: ClassVar = {"pool": "digits"}  # always at hand

    def __init__(self, config: OutOfDomainConfig, task: Task) -> None:
        super().__init__(config, task)
        self.shuffle = Shuffle(task.rng, task.device)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        return Synthesis(None)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        images = self.task.unlabelled
        assert images is not None  # lent because `needs` asks for it
        return Batch(self.task.normalize(self.task.augment(to_unit(images[self.shuffle.next(len(images), size)]))))

    @classmethod
    def outside_knowledge(cls, config: OutOfDomainConfig) -> str | None:
        return f"an unlabelled pool ({config.pool})"


def _smoke(pool: str, epochs: int = 20, student_steps: int = 30) -> Published:
    # The steps, batches and learning rate of the lead method's settings: a table without changes has one schedule.
    return Published(
        schedule=Schedule(epochs=epochs, student_steps=student_steps, batch_size=128, lr=0.2, lr_min=2e-4),
        config={"pool": pool},
        origin="ours",
        source="not tuned: a pool that needs no download",
    )


OutOfDomainKD.equal_lr = {"digits": 0.05}  # results/trials/digits_equal.json
OutOfDomainKD.smoke = {
    "digits": _smoke("glyphs16", epochs=8),
    "fashion_mnist": _smoke("digits", epochs=10),
    "glyphs16": _smoke("digits", student_steps=100),
}
# How its settings of `smoke` are written has changed, and nothing else.
OutOfDomainKD.same_results = ("aa4227b16e1b3302ac581bbf23324cbfdac439f0331b2cf2464cb7acac1c5f0a",)
