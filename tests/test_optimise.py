from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dfkd_bench.method import Schedule
from dfkd_bench.optimise import build_optimizer, learning_rate, set_learning_rate


def schedule(**fields: Any) -> Schedule:
    return Schedule(**({"epochs": 120, "warmup_epochs": 20, "student_steps": 1, "batch_size": 8, "lr": 0.2} | fields))


NAYER = schedule(lr_min=2e-4)
FM = schedule(epochs=220, lr_min=2e-4)
CMI = schedule(epochs=200, warmup_epochs=0, lr=0.1)


@pytest.mark.parametrize(
    ("of", "done", "lr"),
    [
        (NAYER, 0, 0.2),
        (NAYER, 1, 0.1999507053805366),
        (NAYER, 50, 0.1001),
        (NAYER, 99, 0.0002492946194634132),
        (FM, 0, 0.2),
        (FM, 1, 0.1999876755849179),
        (FM, 100, 0.1001),
        (FM, 199, 0.00021232441508210729),
        (CMI, 0, 0.1),
        (CMI, 1, 0.09999383162408304),
        (CMI, 100, 0.05),
        (CMI, 199, 6.168375916970619e-06),
    ],
)
def test_cosine(of: Schedule, done: int, lr: float) -> None:
    assert learning_rate(of, done) == pytest.approx(lr, rel=1e-9)


def test_a_horizon_of_its_own() -> None:
    assert learning_rate(schedule(lr_horizon=200, lr_min=2e-4), 1) == pytest.approx(0.1999876755849179, rel=1e-9)


@pytest.mark.parametrize("done", [0, 37, 119])
def test_constant(done: int) -> None:
    assert learning_rate(schedule(lr_rule="constant"), done) == 0.2


@pytest.mark.parametrize(
    ("done", "lr"), [(0, 0.1), (119, 0.1), (120, 0.01), (149, 0.01), (150, 1e-3), (180, 1e-4), (199, 1e-4)]
)
def test_multistep(done: int, lr: float) -> None:
    steps = schedule(epochs=200, warmup_epochs=0, lr=0.1, lr_rule="multistep", lr_milestones=(120, 150, 180))
    assert learning_rate(steps, done) == pytest.approx(lr, rel=1e-12)


def test_multistep_with_a_factor_of_its_own() -> None:
    steps = schedule(lr_rule="multistep", lr_milestones=(10, 20), lr_gamma=0.2)
    assert learning_rate(steps, 25) == pytest.approx(0.2 * 0.04, rel=1e-12)


def test_cosine_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=2e-4)
    for done in range(100):
        assert learning_rate(NAYER, done) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def one_weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0]))


def test_sgd_has_momentum_without_nesterov_and_weight_decay() -> None:
    weight = one_weight()
    optimizer = build_optimizer([weight], schedule(lr=0.1, momentum=0.5, weight_decay=0.25))
    expected, velocity = 1.0, 0.0
    for gradient in (2.0, -1.0):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.25 * expected
        expected -= 0.1 * velocity
    assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_adam_has_weight_decay_in_the_gradient() -> None:
    weight = one_weight()
    optimizer = build_optimizer([weight], schedule(optimizer="adam", lr=0.1, weight_decay=0.5))
    weight.grad = torch.tensor([-0.4])  # with the decay +0.1: the first step goes down by the learning rate
    optimizer.step()
    assert weight.item() == pytest.approx(0.9, rel=1e-5)


def test_set_learning_rate_reaches_every_group() -> None:
    groups: list[dict[str, Any]] = [{"params": [one_weight()]}, {"params": [one_weight()], "lr": 3.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    set_learning_rate(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]


@pytest.mark.parametrize(
    ("kind", "plain_kind", "options"),
    [("sgd", torch.optim.SGD, {"momentum": 0.9}), ("adam", torch.optim.Adam, {})],
    ids=["sgd", "adam"],
)
def test_the_fused_optimiser_makes_the_steps_of_the_plain_one(
    kind: str, plain_kind: Any, options: dict[str, float]
) -> None:
    draw = torch.Generator().manual_seed(0)
    fused = nn.Parameter(torch.randn(64, generator=draw))
    plain = nn.Parameter(fused.detach().clone())
    fast = build_optimizer([fused], schedule(lr=0.1, optimizer=kind, weight_decay=5e-4))
    slow = plain_kind([plain], lr=0.1, weight_decay=5e-4, fused=False, foreach=False, **options)
    for _ in range(5):
        gradient = torch.randn(64, generator=draw)
        for parameter, optimizer in ((fused, fast), (plain, slow)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
