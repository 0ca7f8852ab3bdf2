"""Losses as pure functions of logits, each with golden values in tests/test_losses.py.

Legend: b images, K classes. Student logits come first, teacher logits second. Everything is computed in fp32 (or
in the inputs' own precision if that is higher), whatever autocast is on, because a KL divergence at T = 20 lives on
small differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def kl_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each row [b], at ``temperature``, without the factor T^2. Gradient reaches both."""
    log_student = F.log_softmax(_full(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(_full(teacher_logits) / temperature, dim=1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * mean over the batch of KL(teacher || student), 0-d. The field's distillation loss.

    Divided by b, not by b*K ("batchmean"). Source: zju-vipa/CMI, datafree/criterions.py.
    """
    return temperature**2 * kl_rows(student_logits, teacher_logits, temperature).mean()


def masked_adversarial(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Minus the KL (T = 1) of the rows where teacher and student agree on the class, divided by the full b; 0-d.

    Minimised by a generator it raises disagreement where there is none yet. No gradient through the mask.
    Source: CMI (IJCAI 2021), section 3; zju-vipa/CMI, datafree/synthesis/contrastive.py.
    """
    agree = (student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).detach()
    return -(kl_rows(student_logits, teacher_logits) * agree).mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, 0-d. ``targets``: class indices [b]. The one-hot (class-prior) loss of pool methods."""
    return F.cross_entropy(_full(logits), targets)
