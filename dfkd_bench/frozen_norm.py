"""BatchNorm of a frozen network, in evaluation mode, on a GPU: a line of each channel, forward and backward."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_bench.statistics import kept_neutral


class _Frozen(torch.autograd.Function):
    """The forward is PyTorch's; the gradient is the slope times the one that comes, channels-last as the activation.

    PyTorch's own backward for this case makes a gradient [n, c, h, w] in rows, whatever the activation's layout: the
    addition of the statistics' gradient and the convolution before it would copy it there and back. It also keeps the
    activation, which nothing needs here. Source: pytorch/pytorch, aten/src/ATen/native/cuda/Normalization.cu,
    batch_norm_elementwise_backward_eval.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(weight * scale, mean)
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slope, mean = ctx.saved_tensors
        zero, one = kept_neutral(mean.shape[0], mean.device)
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        return torch.batch_norm_elemt(gradient, slope, zero, zero, one, 0.0), None, None, None, None, None


def _forward(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``BatchNorm2d.forward``, but for a gradient to the activation alone."""
    weight, bias, mean, variance = self.weight, self.bias, self.running_mean, self.running_var
    if (
        self.training
        or not (x.requires_grad and x.dtype == torch.bfloat16)
        or weight is None
        or weight.requires_grad
        or mean is None
        or variance is None
    ):
        return nn.BatchNorm2d.forward(self, x)
    made: Tensor = _Frozen.apply(x, weight, bias, mean, variance, self.eps)
    return made


def lighten(model: nn.Module) -> nn.Module:
    """``model`` with BatchNorms that take this way where they are frozen, and PyTorch's elsewhere; it is changed.

    The layers keep their class, their parameters and their names.
    """
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return model
