"""Losses as pure functions of logits, each with golden values in tests/test_losses.py.

Legend: b images, K classes. Student logits come first, teacher logits second. Everything is computed in fp32 (or
in the inputs' own precision if that is higher), whatever autocast is on, because a KL divergence at T = 20 lives on
small differences.
"""

from __future__ import annotations

import math

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


def confidence(logits: Tensor) -> Tensor:
    """Mean cross entropy to the logits' own argmax, 0-d, in [0, ln K]. No gradient through the label.

    Source: DAFL (ICCV 2019), "one-hot loss"; zju-vipa/CMI, datafree/synthesis/generative.py.
    """
    return cross_entropy(logits, logits.argmax(dim=1))


def class_balance(logits: Tensor, base: float = math.e) -> Tensor:
    """Minus the entropy of the batch's mean class probabilities, 0-d: -log K if all classes are used equally, 0 if one.

    The mean is taken in logarithms, so a class that is never predicted counts 0 and not 0 * -inf = NaN as in the
    released codes; other values are theirs. ``base`` of the logarithm: e in zju-vipa/CMI,
    datafree/synthesis/generative.py; 10 in DAFL's own code ("information entropy"), which is 0.434 times as much.
    """
    log_probabilities = F.log_softmax(_full(logits), dim=1)
    log_mean = torch.logsumexp(log_probabilities, dim=0) - math.log(logits.shape[0])
    return (log_mean.exp() * log_mean).sum() / math.log(base)


def activation(features: Tensor) -> Tensor:
    """Minus the mean absolute value of ``features`` (any shape), 0-d. Source: DAFL (ICCV 2019), activation loss."""
    return -_full(features).abs().mean()


def logit_distance(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean absolute difference over b and K, 0-d. Source: DFAD (arXiv 1912.11006), for student and generator alike."""
    return (_full(student_logits) - _full(teacher_logits)).abs().mean()
