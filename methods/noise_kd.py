"""Control: knowledge distillation with images of noise.

What a method must beat before its images can be said to carry anything.

Differences from the paper
1. There is no paper; the noise is uniform in [0, 1] for every pixel and channel on its own, drawn anew each step.

Differences from the released code
1. There is none; the schedule is that of the table's first data-free method.
"""

from __future__ import annotations

import torch
from torch import nn

from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Synthesis

CARD = {
    "title": "KD with noise (uniform pixels)",
    "family": "control",
    "year": None,
    "venue": "",
    "confirmed": True,
    "knowledge": "none",
}


class NoiseKD(Method):
    """KL divergence to the teacher on uniform noise."""

    Config = MethodConfig

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        return Synthesis(None)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        task = self.task
        return Batch(task.normalize(torch.rand(size, *task.image_shape, device=task.device, generator=task.rng)))


NoiseKD.equal_lr = {"digits": 0.2}  # results/trials/digits_equal.json
