from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfkd_bench.losses import cross_entropy, kl_divergence, kl_rows, masked_adversarial

# Golden values were computed in float64 by the released code of CMI on these logits: 4 rows, 3 classes.
S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
ROWS = [0.08904370665345371, 1.1099532826728042, 0.28754774158236296, 0.1578738210217683]  # KL at T = 1
MASK = torch.tensor([1, 0, 1, 1], dtype=torch.float64)  # where the argmaxes agree


@pytest.mark.parametrize(
    ("temperature", "value"),
    [
        (1.0, 0.41110463798259733),
        (4.0, 0.5447335268671019),
        (20.0, 0.5398970485485377),  # divided by b*K it were 0.1799656828, without T^2 0.00134974
    ],
)
def test_kl_divergence(temperature: float, value: float) -> None:
    assert kl_divergence(S, T, temperature).item() == pytest.approx(value, rel=1e-10)


def test_kl_of_each_row() -> None:
    assert kl_rows(S, T).tolist() == pytest.approx(ROWS, rel=1e-10)


def test_rows_are_without_the_factor_of_the_temperature() -> None:
    assert 400 * kl_rows(S, T, 20).mean().item() == pytest.approx(0.5398970485485377, rel=1e-10)


def test_the_student_comes_first() -> None:
    both_ways = 2 * 0.4007924402599848  # golden: half of each order
    assert kl_divergence(T, S).item() == pytest.approx(both_ways - 0.41110463798259733, rel=1e-10)
    assert kl_divergence(T, S).item() != pytest.approx(0.41110463798259733, rel=1e-3)


def test_kl_is_zero_for_logits_that_differ_by_a_constant_a_row() -> None:
    shift = torch.tensor([[3.0], [-1.0], [0.0], [100.0]], dtype=torch.float64)
    assert kl_divergence(T + shift, T, 20).item() == pytest.approx(0, abs=1e-12)


def test_kl_gradient_reaches_both_arguments() -> None:
    inputs = (S.clone().requires_grad_(), T.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: kl_divergence(s, t, 4), inputs)


def test_kl_gradient_of_the_student_is_the_difference_of_the_probabilities() -> None:
    s = S.clone().requires_grad_()
    kl_divergence(s, T, 20).backward()
    expected = 20 * ((S / 20).softmax(1) - (T / 20).softmax(1)) / 4
    torch.testing.assert_close(s.grad, expected)


def test_masked_adversarial() -> None:
    # Without the mask it were -0.4111046380, divided by the three agreeing rows -0.1781550898.
    assert masked_adversarial(S, T).item() == pytest.approx(-0.13361631731439624, rel=1e-10)


@pytest.mark.parametrize("row", range(4))
def test_changing_the_answer_of_one_row_changes_that_rows_share_only(row: int) -> None:
    changed = S.clone()
    changed[row] = S[row].roll(1)
    if MASK[row] == 0:
        changed[row] = T[row]  # now it agrees, at no distance
    others = [MASK[i].item() * ROWS[i] for i in range(4) if i != row]
    assert masked_adversarial(changed, T).item() == pytest.approx(-sum(others) / 4, rel=1e-10)


def test_masked_adversarial_is_zero_where_nobody_agrees() -> None:
    assert masked_adversarial(T.roll(1, dims=1), T).item() == 0


def test_masked_adversarial_is_zero_for_equal_logits() -> None:
    assert masked_adversarial(T, T).item() == 0


def test_masked_adversarial_has_the_gradient_of_a_constant_mask_on_both_sides() -> None:
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    got = torch.autograd.grad(masked_adversarial(s, t), (s, t))
    expected = torch.autograd.grad(-(MASK * kl_rows(s, t)).sum() / 4, (s, t))
    torch.testing.assert_close(got, expected)


def test_masked_adversarial_gives_rows_that_disagree_no_gradient() -> None:
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    for gradient in torch.autograd.grad(masked_adversarial(s, t), (s, t)):
        assert (gradient.abs().sum(dim=1) > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize(("labels", "value"), [([1, 0, 1, 2], 0.26757831190703335), ([2, 0, 0, 1], 2.0425783119070333)])
def test_cross_entropy(labels: list[int], value: float) -> None:
    assert cross_entropy(T, torch.tensor(labels)).item() == pytest.approx(value, rel=1e-10)


def _all_losses(s: Tensor, t: Tensor) -> Tensor:
    labels = torch.tensor([1, 0, 1, 2])
    return torch.stack([kl_divergence(s, t, 20), masked_adversarial(s, t), cross_entropy(s, labels)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    s, t = S.to(dtype), T.to(dtype)
    losses = _all_losses(s, t)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, _all_losses(s.float(), t.float()), rtol=0, atol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    s, t = S.float(), T.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _all_losses(s, t)
    torch.testing.assert_close(inside, _all_losses(s, t), rtol=0, atol=0)


def test_float32_agrees_with_the_golden_values() -> None:
    expected = torch.tensor([0.5398970485485377, -0.13361631731439624])
    torch.testing.assert_close(
        _all_losses(S.float(), T.float())[:2], expected, rtol=1e-4, atol=0
    )  # T = 20 cancels: 1.2e-5
