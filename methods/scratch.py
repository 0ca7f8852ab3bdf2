"""Control: the student trained on real images and labels, without a teacher.

What the student is worth by itself at the same number of steps.

Differences from the paper
1. There is no paper; plain cross entropy.

Differences from the released code
1. There is none; the schedule is that of the table's first data-free method.
"""

from __future__ import annotations

from torch import Tensor, nn

from dfkd_bench.losses import cross_entropy
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Synthesis, Task
from dfkd_bench.shuffle import Shuffle

CARD = {
    "title": "Student trained on real data, no teacher",
    "family": "control",
    "year": None,
    "venue": "",
    "confirmed": True,
    "knowledge": "the training data and labels",
}


class Scratch(Method):
    """Cross entropy on real images, augmented as in training."""

    Config = MethodConfig
    needs = frozenset({"training_data"})

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        self.shuffle = Shuffle(task.rng, task.device, full=True)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        return Synthesis(None)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        data = self.task.training_data
        assert data is not None  # lent because `needs` asks for it
        images, labels = data.draw(self.shuffle, size)
        return Batch(self.task.normalize(self.task.augment(images)), extras={"labels": labels})

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        return cross_entropy(student(batch.images), batch.extras["labels"])


# Batches may come from host memory: in the same order, with the same bits.
Scratch.same_results = ("95ccf8626379359c3d920749a9e56d7c916ff868da4c09b994291dc19fb4ffba",)
Scratch.equal_lr = {"digits": 0.05}  # results/trials/digits_equal.json
