"""What a classifier is worth: accuracy, agreement with the teacher, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd_bench.ahead import Images, taken
from dfkd_bench.augment import Normalize, to_unit


@dataclass(frozen=True)
class Evaluation:
    """All in percent. ``agreement``: share of images where student and teacher name the same class (None: no
    teacher given). ``calibration``: expected calibration error over 15 equal bins of the top probability."""

    accuracy: float
    calibration: float
    agreement: float | None = None


@torch.no_grad()
def logits_of(model: Callable[[Tensor], Tensor], images: Images, normalize: Normalize, batch_size: int = 512) -> Tensor:
    """fp32 logits [n, K] of uint8 images [n, C, H, W], in batches on the images' own device or the normaliser's."""
    device = normalize.mean.device
    if isinstance(images, Tensor):
        batches = iter(images.split(batch_size))
    else:
        batches = taken(images, torch.arange(len(images)).split(batch_size))
    return torch.cat([model(normalize(to_unit(batch.to(device, non_blocking=True)))).float() for batch in batches])


def evaluate(
    student: nn.Module, images: Images, labels: Tensor, normalize: Normalize, teacher_classes: Tensor | None = None
) -> Evaluation:
    """Evaluate ``student`` (put into eval mode, its mode restored) on uint8 ``images`` and int64 ``labels``."""
    training = student.training
    student.eval()
    logits = logits_of(student, images, normalize)
    student.train(training)
    confidence, answers = logits.softmax(dim=1).max(dim=1)
    correct = answers == labels
    agreement = None if teacher_classes is None else 100 * (answers == teacher_classes).double().mean().item()
    return Evaluation(
        accuracy=100 * correct.double().mean().item(),
        calibration=100 * expected_calibration_error(confidence, correct),
        agreement=agreement,
    )


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean over images of |accuracy - confidence| of their bin, in [0, 1] (Guo et al., ICML 2017, eq. 3)."""
    index = (confidence * bins).long().clamp_(0, bins - 1)
    count = torch.zeros(bins, device=confidence.device).index_add_(0, index, torch.ones_like(confidence))
    gap = torch.zeros(bins, device=confidence.device).index_add_(0, index, correct.float() - confidence)
    return float((gap.abs().sum() / count.sum()).item())
