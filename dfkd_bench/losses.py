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

from dfkd_bench.exact import exact


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _as_full(product: Tensor, operand: Tensor) -> Tensor:
    """A product of ``exact`` operands in the precision that ``_full`` gives one of them."""
    return product if operand.dtype == torch.float64 else product.float()


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


def kl_elementwise(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) averaged over b *and* K, 0-d: ``kl_divergence`` divided by K.

    Source: skgyu/SpaceshipNet, model_CFE_mSARC_base_V37.py (PyTorch's KLDivLoss with its default reduction).
    """
    return kl_divergence(student_logits, teacher_logits, temperature) / student_logits.shape[1]


def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over the rows of -log of their positives' shares of the similarity, 0-d; ``embeddings`` [b, d], b >= 2.

    Similarity: exp(cosine / temperature). Positives of a row: the other rows with its label [b]; a row without any
    is left out. Source: Khosla et al., "Supervised Contrastive Learning" (NeurIPS 2020), eq. 2.
    """
    unit = exact(F.normalize(_full(embeddings), dim=1))
    similarity = _as_full(unit @ unit.T, embeddings) / temperature
    itself = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    positive = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
    log_share = similarity - similarity.masked_fill(itself, -math.inf).logsumexp(dim=1, keepdim=True)
    count = positive.sum(dim=1)
    rows = -(log_share * positive).sum(dim=1) / count.clamp(min=1)
    return rows.sum() / (count > 0).sum().clamp(min=1)


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """What each place of ``features`` [b, F, h, w] adds to each class: [b, K, h, w], with the classifier's [K, F].

    Without the classifier's bias; averaged over h and w these are the logits less the bias. Source: Zhou et al.,
    "Learning Deep Features for Discriminative Localization" (CVPR 2016), eq. 2.
    """
    return _as_full(F.conv2d(exact(_full(features)), exact(_full(weight))[:, :, None, None]), features)


def grad_cam(features: Tensor, gradients: Tensor) -> Tensor:
    """``features`` [b, C, h, w] summed over C, weighted by the spatial means of ``gradients`` (same shape): [b, h, w].

    Neither ReLU nor normalisation. Source: Grad-CAM (ICCV 2017), eq. 1-2, in the form of skgyu/SpaceshipNet,
    model_CFE_mSARC_base_V37.py.
    """
    return (_full(gradients).mean(dim=(2, 3), keepdim=True) * _full(features)).sum(dim=1)


def clamped_js(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """(KL(M || S) + KL(M || T)) / 2 of the softmaxes S, T at ``temperature`` and their mean M, over b; 0-d.

    The direction is not the textbook's, and after M was formed all three are clamped to [0.01, 0.99]. So it can exceed
    ln 2 and, once the clamp acts, be negative. Symmetric; gradient reaches both; no factor T^2.
    Source: NVlabs/DeepInversion, cifar10/deepinversion_cifar10.py; zju-vipa/CMI, datafree/criterions.py.
    """
    student = F.softmax(_full(student_logits) / temperature, dim=1)
    teacher = F.softmax(_full(teacher_logits) / temperature, dim=1)
    mean = ((student + teacher) / 2).clamp(0.01, 0.99)
    log_both = student.clamp(0.01, 0.99).log() + teacher.clamp(0.01, 0.99).log()
    return (mean * (mean.log() - log_both / 2)).sum() / student.shape[0]


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in [b, C, H, W], summed over the four directions, 0-d.

    The directions are right, down and both diagonals. Source: zju-vipa/CMI, datafree/synthesis/deepinversion.py.
    """
    images = _full(images)
    differences = (
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, :] - images[:, :, :-1, :],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
    )
    return torch.stack([difference.abs().mean() for difference in differences]).sum()


def contrastive_rows(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each row [N]: the cross entropy of telling its own key among all ``keys`` by cosine / temperature.

    ``queries`` and ``keys``: [N, d], row i belongs to row i, not normalised. Gradient reaches the queries only.
    Source: CMI (IJCAI 2021), contrastive loss; zju-vipa/CMI, datafree/synthesis/contrastive.py.
    """
    query = exact(F.normalize(_full(queries), dim=1))
    key = exact(F.normalize(_full(keys.detach()), dim=1))
    logits = _as_full(query @ key.T, queries) / temperature
    return logits.logsumexp(dim=1) - logits.diagonal()


def contrastive(queries: Tensor, keys: Tensor, temperature: float, fresh: int) -> Tensor:
    """Mean of ``contrastive_rows`` over the first ``fresh`` rows plus, if there are more, their mean over the others.

    0-d. The two means are added, not averaged: cached rows weigh as much as new ones, however many there are.
    Source: zju-vipa/CMI, datafree/synthesis/contrastive.py.
    """
    rows = contrastive_rows(queries, keys, temperature)
    loss = rows[:fresh].mean()
    return loss if rows.shape[0] == fresh else loss + rows[fresh:].mean()


def bounded_agreement(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """1 - ``clamped_js`` / K cut to [0, 1], 0-d: a generator that minimises it looks for disagreement.

    Divided by b *and* K. Source: kuluhan/PRE-DFKD, utils/aux.py; the same in gaurav104/LRA and TA-DFKD-Official.
    """
    return 1 - (clamped_js(student_logits, teacher_logits, temperature) / student_logits.shape[1]).clamp(0, 1)


def latent_moments(latents: Tensor) -> Tensor:
    """How far ``latents`` [b, d], b >= 2, are from mean 0 and unbiased variance 1 of each dimension over b; 0-d.

    Mean squares over d of both, added. Source: kuluhan/PRE-DFKD, distillation.py.
    """
    latents = _full(latents)
    return (latents.var(dim=0) - 1).square().mean() + latents.mean(dim=0).square().mean()


def normal_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mean, exp(log_variance)) from N(0, 1), summed over d and averaged over b; both [b, d]; 0-d, >= 0.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (ICLR 2014), appendix B.
    """
    mean, log_variance = _full(mean), _full(log_variance)
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean()


def variation_norms(images: Tensor) -> Tensor:
    """The l2 form of total variation: norms of the differences of neighbours in all of [b, C, H, W], added; 0-d.

    The four directions are right, down and both diagonals. Source: bigdata-inha/TA-DFKD-Official,
    TA-DFKD-main-CIFAR.py, after NVlabs/DeepInversion, cifar10/deepinversion_cifar10.py.
    """
    images = _full(images)
    differences = (
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, :] - images[:, :, :-1, :],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


def log_confusion(free: Tensor, accuracy: float) -> Tensor:
    """Logarithm of the matrix [K, K] of probabilities that a teacher says j (column) where i (row) is true.

    ``accuracy``, in (0, 1), stands on the diagonal; the rest of each row is shared out by the softmax of that row of
    ``free`` [K, K - 1], K >= 2, whose entries are those of the row without the diagonal, in order. Rows add up to 1.
    Source: DFND (CVPR 2021), the adaptation matrix; huawei-noah/Efficient-Computing,
    Data-Efficient-Model-Compression/DFND/DFND-train.py.
    """
    classes = torch.arange(free.shape[0], device=free.device)
    row, column = classes.unsqueeze(1), classes.unsqueeze(0)
    wrong = F.log_softmax(_full(free), dim=1) + math.log1p(-accuracy)
    position = (column - (column > row).to(column.dtype)).clamp(max=free.shape[1] - 1)  # in ``free`` without diagonal
    return torch.where(row == column, math.log(accuracy), wrong.gather(1, position))


def noisy_cross_entropy(student_logits: Tensor, labels: Tensor, log_confusions: Tensor) -> Tensor:
    """Mean cross entropy of ``labels`` [b], which may be wrong, to what the student would expect them to be; 0-d.

    The student's probabilities [b, K] (T = 1) times the matrix whose logarithm is ``log_confusions`` [K, K]: a sure
    student need not follow a label that the teacher is known to confuse with its own. Gradient reaches both.
    Source: as ``log_confusion``.
    """
    log_student = F.log_softmax(_full(student_logits), dim=1)
    return -(log_student + log_confusions.T[labels]).logsumexp(dim=1).mean()
