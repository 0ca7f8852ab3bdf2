"""Control: knowledge distillation with the teacher's own training images.

Geoffrey Hinton, Oriol Vinyals, Jeff Dean, "Distilling the Knowledge in a Neural Network", 2015.
https://arxiv.org/abs/1503.02531

What a data-free method could reach at the same student steps if its images were as good as the real ones.

Differences from the paper
1. No cross entropy with the true labels: the loss is the data-free methods' own, so that only the images differ.

Differences from the released code
1. There is none; the schedule is that of the table's first data-free method.
"""

from __future__ import annotations

from torch import nn

from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Synthesis, Task
from dfkd_bench.shuffle import Shuffle

CARD = {
    "title": "KD with real data",
    "family": "control",
    "year": 2015,
    "venue": "NeurIPS workshop",
    "confirmed": True,
    "knowledge": "the training data",
}


class RealKD(Method):
    """KL divergence to the teacher on real images, augmented as in training."""

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
        images, _ = data.draw(self.shuffle, size)
        return Batch(self.task.normalize(self.task.augment(images)))


# Batches may come from host memory: in the same order, with the same bits.
RealKD.same_results = ("f90b965cfe05a46271f11ca314797a484c542e5dd8b2fe71328b6bc3468f7fc5",)
RealKD.equal_lr = {"digits": 0.05}  # results/trials/digits_equal.json
