from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.statistics import BatchNormMatcher, _CudaMoments, _Moments, batch_moments

# Golden values: float64, computed by the hooks of zju-vipa/Fast-Datafree on these batches.
COUNT = torch.arange(16, dtype=torch.float64)
X1, X2, X3 = ((COUNT / 10).view(2, 2, 2, 2), COUNT.sin().view(2, 2, 2, 2), COUNT.cos().view(2, 2, 2, 2))


def teacher_with(mean: list[float], variance: list[float]) -> nn.Sequential:
    layer = nn.BatchNorm2d(len(mean)).double().eval()
    layer.running_mean = torch.tensor(mean, dtype=torch.float64)
    layer.running_var = torch.tensor(variance, dtype=torch.float64)
    return nn.Sequential(layer)


@pytest.fixture
def teacher() -> nn.Sequential:
    return teacher_with([0.5, 1.0], [0.2, 0.5])


def loss_of(matcher: BatchNormMatcher, teacher: nn.Module, x: Tensor) -> Tensor:
    with matcher.watching():
        teacher(x)
    return matcher.loss()


def remember(matcher: BatchNormMatcher, teacher: nn.Module, *batches: Tensor) -> None:
    for x in batches:
        loss_of(matcher, teacher, x)
        matcher.update()


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (X1, 0.3993632302158505),  # unbiased variance: 0.3735812978; squared and averaged: 0.0565062500
        (X2, 1.2690831525463044),
    ],
)
def test_plain(teacher: nn.Module, x: Tensor, value: float) -> None:
    assert loss_of(BatchNormMatcher(teacher), teacher, x).item() == pytest.approx(value, rel=1e-10)


def test_moments_are_mean_and_biased_variance() -> None:
    mean, variance = batch_moments(X1)
    assert [*mean.tolist(), *variance.tolist()] == pytest.approx([0.55, 0.95, 0.1725, 0.1725], rel=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_and_their_gradient_do_not_depend_on_the_layout(memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    x = x.to(memory_format=memory_format).requires_grad_()
    torch.testing.assert_close(batch_moments(x), (mean, variance))
    assert torch.autograd.gradcheck(batch_moments, (x,))


def bf16_activation(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.5 + 2
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def test_bf16_moments_are_added_up_in_fp32() -> None:
    x = bf16_activation(64, 8, 16, 16)
    variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    got = batch_moments(x)
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got, (mean.float(), variance.float()), rtol=2e-5, atol=2e-5)  # bf16 alone: 4e-3


def test_the_gradient_of_bf16_moments_is_the_plain_one_rounded() -> None:
    x = bf16_activation(8, 4, 6, 6).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weights = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([1.0, 0.5, -2.0, 3.0])
    for each in (x, exact):
        mean, variance = batch_moments(each)
        (mean * weights[0] + variance * weights[1]).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-7, atol=1e-6)


def line(x: Tensor, slope: Tensor, offset: Tensor, mean: Tensor, invstd: Tensor, _eps: float) -> Tensor:
    """``torch.batch_norm_elemt``, which is for GPUs alone."""
    return (x - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1) * slope.view(-1, 1, 1) + offset.view(-1, 1, 1)


def test_the_form_for_gpus_has_the_plain_moments_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "batch_norm_elemt", line)
    x = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([1.0, 0.5, -2.0, 3.0])
    found = []
    for mean, variance in (_CudaMoments.apply(x), _Moments.apply(x.permute(0, 2, 3, 1).reshape(-1, 4))):
        (gradient,) = torch.autograd.grad((mean * weights[0] + variance * weights[1]).sum(), x)
        found.append((mean, variance, gradient))
    torch.testing.assert_close(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bf16_moments_on_a_gpu_are_those_of_the_plain_form(memory_format: torch.memory_format) -> None:
    """Added up in fp32; the gradient rounded once, in the activation's layout."""
    x = bf16_activation(64, 8, 16, 16).cuda().contiguous(memory_format=memory_format).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weights = torch.linspace(-1, 2, 8, device="cuda"), torch.linspace(3, -2, 8, device="cuda")
    for each in (x, exact):
        mean, variance = batch_moments(each)
        (mean * weights[0] + variance * weights[1]).sum().backward()
    torch.testing.assert_close(batch_moments(x), tuple(m.float() for m in batch_moments(exact)), rtol=2e-5, atol=2e-5)
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-7, atol=1e-6)


def three_layers() -> nn.Sequential:
    """The second one's running statistics are those of its input X2: its norms are 0."""
    mean, variance = (each.tolist() for each in batch_moments(X2))
    layers = [
        teacher_with(*each)[0] for each in (([0.5, 1.0], [0.2, 0.5]), (mean, variance), ([0.1, -0.2], [1.5, 0.7]))
    ]
    return nn.Sequential(*layers)


def both_forms(matcher: BatchNormMatcher, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient, each layer seeing ``x`` itself."""
    found = []
    for form in (matcher._layer_by_layer, matcher._at_once):
        x = x.detach().requires_grad_()
        with matcher.watching():
            for layer in matcher.layers:
                layer(x)
        value = 3 * form()
        (gradient,) = torch.autograd.grad(value, x)
        found.append((value, gradient))
    return found


@pytest.mark.parametrize("remembered", [False, True])
def test_all_layers_at_once_are_the_layers_one_by_one(remembered: bool) -> None:
    matcher = BatchNormMatcher(three_layers(), 0.9)
    if remembered:
        with matcher.watching():
            for layer, x in zip(matcher.layers, (X1, X2, X3), strict=True):
                layer(x)
        matcher.update()
    one_by_one, at_once = both_forms(matcher, X2)
    assert at_once[1].isfinite().all()
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_layers_at_once_on_a_gpu() -> None:
    matcher = BatchNormMatcher(three_layers().float().cuda())
    one_by_one, at_once = both_forms(matcher, X3.float().cuda())
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-6)


def test_the_first_update_copies_and_the_second_decays(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1)
    assert matcher.remembered is not None
    first = [*matcher.remembered[0][0].tolist(), *matcher.remembered[0][1].tolist()]
    assert first == pytest.approx([0.55, 0.95, 0.1725, 0.1725], rel=1e-10)
    remember(matcher, teacher, X2)
    mean, variance = matcher.remembered[0]
    assert mean.tolist() == pytest.approx([0.5168669229264814, 0.8573291705653374], rel=1e-10)
    assert variance.tolist() == pytest.approx([0.20046113748865407, 0.2035784775991824], rel=1e-10)


def test_momentum_after_one_update(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1)
    assert loss_of(matcher, teacher, X2).item() == pytest.approx(0.4400862770313635, rel=1e-10)


def test_momentum_after_two_updates(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1, X2)
    assert loss_of(matcher, teacher, X3).item() == pytest.approx(0.481402901976922, rel=1e-10)


def test_gradient_after_one_update(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1)
    x = X2.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(matcher, teacher, x), x)
    golden = [0.0014590584116262462, 0.0014917848938346362, 0.0014944227992265376, 0.0014645468497499607]
    assert gradient.flatten()[:4].tolist() == pytest.approx(golden, rel=1e-8)


def test_remembered_statistics_shrink_the_gradient_by_one_minus_momentum(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1)
    x = X2.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(matcher, teacher, x), x)
    # The plain expression at the mixed statistics: the batch's own, moved there by a constant.
    assert matcher.remembered is not None
    layer, value = teacher[0], torch.zeros((), dtype=torch.float64)  # type: ignore[index]
    for target, now, old in zip(
        (layer.running_mean, layer.running_var), batch_moments(x), matcher.remembered[0], strict=True
    ):
        value = value + torch.linalg.vector_norm(target - now - 0.9 * (old - now).detach())
    (full,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, (1 - 0.9) * full)


def test_momentum_before_the_first_update_is_plain(teacher: nn.Module) -> None:
    assert loss_of(BatchNormMatcher(teacher, 0.9), teacher, X1).item() == pytest.approx(0.3993632302158505, rel=1e-10)


def test_momentum_on_the_remembered_batch_is_plain(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X2)
    assert loss_of(matcher, teacher, X2).item() == pytest.approx(1.2690831525463044, rel=1e-10)


def test_without_momentum_nothing_is_remembered(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.0)
    remember(matcher, teacher, X1)
    assert matcher.remembered is None
    assert loss_of(matcher, teacher, X2).item() == pytest.approx(1.2690831525463044, rel=1e-10)


def test_zero_for_a_batch_with_the_running_statistics() -> None:
    mean, variance = batch_moments(X2)
    teacher = teacher_with(mean.tolist(), variance.tolist())
    assert loss_of(BatchNormMatcher(teacher), teacher, X2).item() == pytest.approx(0, abs=1e-12)


def test_linear_in_the_scale_of_all_statistics(teacher: nn.Module) -> None:
    mean = X2.mean(dim=(0, 2, 3), keepdim=True)
    scaled = 3 * mean + 3**0.5 * (X2 - mean)  # three times the mean, three times the variance
    three_times = teacher_with([1.5, 3.0], [0.6, 1.5])
    got = loss_of(BatchNormMatcher(three_times), three_times, scaled).item()
    assert got == pytest.approx(3 * 1.2690831525463044, rel=1e-10)


def test_layers_are_summed_with_equal_weight(teacher: nn.Sequential) -> None:
    second = teacher_with([0.1, -0.2], [1.5, 0.7])
    both = nn.Sequential(teacher[0], second[0])
    apart = loss_of(BatchNormMatcher(teacher), teacher, X2) + loss_of(BatchNormMatcher(second), second, teacher(X2))
    torch.testing.assert_close(loss_of(BatchNormMatcher(both), both, X2), apart)


def test_the_last_forward_pass_counts(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher)
    with matcher.watching():
        teacher(X2)
        teacher(X1)
    assert matcher.loss().item() == pytest.approx(0.3993632302158505, rel=1e-10)


def test_forward_passes_outside_are_not_seen(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    loss_of(matcher, teacher, X1)
    teacher(X2)
    matcher.update()
    assert matcher.remembered is not None
    assert matcher.remembered[0][0].tolist() == pytest.approx([0.55, 0.95])


def test_hooks_are_gone_afterwards_even_after_an_error(teacher: nn.Sequential) -> None:
    def fail_inside() -> None:
        with BatchNormMatcher(teacher).watching():
            assert len(teacher[0]._forward_pre_hooks) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert len(teacher[0]._forward_pre_hooks) == 0


def test_the_remembered_state_carries_no_graph(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1.clone().requires_grad_(), X2.clone().requires_grad_())
    assert matcher.remembered is not None
    assert not any(value.requires_grad for pair in matcher.remembered for value in pair)


def test_state_goes_over_to_a_new_matcher(teacher: nn.Module) -> None:
    matcher, other = BatchNormMatcher(teacher, 0.9), BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1)
    other.load_state_dict(matcher.state_dict())
    remember(other, teacher, X2)  # one more update must work from the restored state
    assert loss_of(other, teacher, X3).item() == pytest.approx(0.481402901976922, rel=1e-10)


def test_the_empty_state_goes_over_too(teacher: nn.Module) -> None:
    matcher = BatchNormMatcher(teacher, 0.9)
    remember(matcher, teacher, X1)
    matcher.load_state_dict(BatchNormMatcher(teacher, 0.9).state_dict())
    assert matcher.remembered is None


def test_half_precision_activations_are_averaged_in_fp32() -> None:
    x = torch.linspace(100, 101, 4096).view(16, 1, 16, 16).bfloat16()
    mean, variance = batch_moments(x)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(variance, x.double().var(correction=0).float().view(1), rtol=1e-4, atol=0)


def test_a_teacher_without_batchnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        BatchNormMatcher(nn.Linear(2, 2))


def test_asking_before_any_forward_pass_says_what_to_do(teacher: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"inside `with watching\(\)`"):
        BatchNormMatcher(teacher).loss()
