from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.method import Task
from dfkd_bench.taps import tapped


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_classifiers_input_is_the_penultimate_features(task: Task) -> None:
    images = torch.rand(3, 1, 8, 8)
    with tapped(task.teacher.classifier) as seen:
        logits = task.teacher(images)
    expected_logits, features, _ = task.teacher.features(images)
    torch.testing.assert_close(seen, [features])
    torch.testing.assert_close(logits, expected_logits)


def test_what_is_seen_has_its_graph(task: Task) -> None:
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    with tapped(task.teacher.classifier) as seen:
        task.teacher(images)
    seen[0].sum().backward()
    assert images.grad is not None
    assert images.grad.any()


def test_every_call_of_every_layer_is_seen_in_its_order() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    x = torch.rand(4, 2)
    with tapped(second, first) as seen:
        for scale in (1, 2):
            second(first(scale * x))
    torch.testing.assert_close(seen, [x, first(x), 2 * x, first(2 * x)])


def test_only_what_is_kept_is_seen() -> None:
    layer, x = nn.Linear(2, 3), torch.rand(4, 2)
    with tapped(layer, keep=lambda features: features.sum(1)) as seen:
        layer(x)
    torch.testing.assert_close(seen, [x.sum(1)])


def test_no_hook_stays_even_after_an_error(task: Task) -> None:
    def broken(_features: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tapped(*task.teacher.modules(), keep=broken):
        task.teacher(torch.rand(3, 1, 8, 8))
    assert hooks(task.teacher) == 0
