"""Bit-exact comparison of what a method may not change, before and after its calls, and of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_bench.check.bench import Bench, Played, Subject
from dfkd_bench.check.broken import Broken

Look = Callable[[Bench], dict[str, Any]]
ALL_CALLS = ("__init__", "synthesize", "student_batch", "student_loss", "after_student_step")

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def unchanged(subject: Subject, what: str, look: Look, calls: tuple[str, ...] = ALL_CALLS) -> None:
    """Play, and compare what ``look`` sees before and after each of ``calls``."""
    bench = subject.bench()

    @contextmanager
    def around(call: str) -> Iterator[None]:
        before = look(bench)
        yield
        if call in calls:
            after = look(bench)
            for name in {**before, **after}:
                if name not in before or name not in after or not same(before[name], after[name]):
                    raise Broken(f"`{call}` changed the {what} {name}")

    bench.play(around=around)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, NaN included."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(type(one) is type(other) and one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))


def same_traces(one: Played, other: Played, otherwise: str) -> None:
    """``Broken`` if two runs handed over anything different; ``otherwise``: how the line begins."""
    for (name, first), (_, second) in zip(one.trace, other.trace, strict=False):
        if not same(first, second):
            raise Broken(f"{otherwise}: {name} differ" if name.startswith("images") else f"{otherwise}: {name} differs")
    if len(one.trace) != len(other.trace):
        raise Broken(f"{otherwise}: {len(one.trace)} results, then {len(other.trace)}")


def state(model: nn.Module) -> dict[str, Any]:
    """Copies of all weights and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def modes(model: nn.Module) -> dict[str, Any]:
    """Training or evaluation, of every module."""
    return {f"mode of {name or 'the whole'}": module.training for name, module in model.named_modules()}


def gradients(model: nn.Module) -> dict[str, Any]:
    """Of every parameter: whether it needs a gradient, and a copy of the one it has."""
    return {
        f"{part} of {name}": value
        for name, parameter in model.named_parameters()
        for part, value in (
            ("requires_grad", parameter.requires_grad),
            ("gradient", None if parameter.grad is None else parameter.grad.clone()),
        )
    }


def hooks(model: nn.Module) -> dict[str, Any]:
    """The number of hooks on every module and parameter."""
    counts = {
        f"hooks of {name or 'the whole'}": sum(len(getattr(module, kind, None) or ()) for kind in _HOOKS)
        for name, module in model.named_modules()
    }
    for name, parameter in model.named_parameters():
        counts[f"hooks of {name}"] = len(parameter._backward_hooks or ())
    return counts
