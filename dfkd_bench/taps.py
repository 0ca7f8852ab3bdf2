"""Feature taps: what goes into layers of a network during a pass, through hooks that remove themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def _itself(features: Tensor) -> Tensor:
    return features


@contextmanager
def tapped(*layers: nn.Module, keep: Callable[[Tensor], Tensor] = _itself) -> Iterator[list[Tensor]]:
    """Inside the ``with`` every forward call of one of ``layers`` appends its input to the list, with its graph.

    ``keep`` is applied to an input at once, so that of large ones only what is needed stays in memory. A classifier's
    input is the penultimate features [b, F].
    """
    seen: list[Tensor] = []

    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(keep(inputs[0]))

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
