"""Products that autocast must leave alone."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(tensor: Tensor) -> Tensor:
    """fp32 ``tensor`` for a product that autocast must not round to bf16: float64 under autocast, else as it is.

    Switching autocast off around a product is not enough: a backward pass that begins inside it, as those of the
    methods do, rounds the gradient's products whatever the forward did. float64 it leaves alone in both directions.
    """
    return tensor.double() if torch.is_autocast_enabled(tensor.device.type) else tensor
