"""The teacher's answers without gradient: the path that every student step takes, so the fast one where it pays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from dfkd_bench.compute import Compute


def teaching(teacher: nn.Module, compute: Compute) -> Callable[[Tensor], Tensor]:
    """Normalised images [b, C, H, W] -> fp32 logits [b, K] of ``teacher`` (in eval mode, where ``compute`` places it).

    In fp32 it is the teacher as it is. In bf16 it is a copy whose BatchNorms are folded into the convolutions before
    them, where the order of layers allows, and whose weights are bf16 once and not in every step. On a CPU a
    convolution, the addition and the ReLU that follow it are one pass over the activation. Rounding apart the answers
    are the same.
    """
    frozen = folded(teacher) if compute.precision == "bf16" else None
    if frozen is not None and compute.device.type == "cpu" and has_one_pass_kernels():
        frozen = in_one_pass(frozen)

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        if frozen is not None:
            logits: Tensor = frozen(images.to(torch.bfloat16))
            return logits.float()
        with compute.autocast():
            logits = teacher(images)
        return logits.float()

    return teach


def folded(teacher: nn.Module) -> GraphModule | None:
    """A copy of ``teacher`` for bf16 with BatchNorms folded into convolutions; None if its layers can't be traced."""
    from torch.fx.experimental.optimization import fuse

    try:
        copy = fuse(teacher)
    except (
        Exception
    ):  # the way through the network depends on its input, and of a user's network there may be any error
        return None
    assert isinstance(copy, GraphModule)
    copy.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
    return copy


def has_one_pass_kernels() -> bool:
    """Whether oneDNN's convolution with what follows it (those of inductor, not public) is there and does bf16 here."""
    kernels = torch.ops.mkldnn
    there = torch.backends.mkldnn.is_available() and hasattr(kernels, "_convolution_pointwise")
    return there and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") and kernels._is_mkldnn_bf16_supported()


class OnePass(nn.Module):
    """A frozen convolution, then ``+ other`` if there is one, then a ReLU if ``relu``; rounded once, at the end.

    Its weights are laid out for the kernel with the first batch, and not anew for each.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu = conv, relu
        padding = [int(side) for side in conv.padding]  # a name of a padding never comes here
        self._how = (padding, list(conv.stride), list(conv.dilation), conv.groups)
        self._laid_out: Tensor | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """[b, n, H, W] to [b, m, H', W'], the shape of ``other``, too; one that is broadcast is added apart."""
        kernel, weight, bias = torch.ops.mkldnn._convolution_pointwise, self._weight(x), self.conv.bias
        made: Tensor
        if other is not None and not self._same_kind(x, other):  # the kernel knows no broadcasting
            made = self.conv(x) + other
            made = F.relu(made) if self.relu else made
        elif other is None:
            made = kernel(x, weight, bias, *self._how, "relu" if self.relu else "none", [], "")
        else:
            made = kernel.binary(
                x, other, weight, bias, *self._how, "add", 1.0, "relu" if self.relu else None, [], None
            )
        return made

    def _weight(self, x: Tensor) -> Tensor:
        if self._laid_out is None:
            kernels: Any = torch._C._nn  # whose stubs leave out the input's shape
            weight: Tensor = self.conv.weight.detach().to_mkldnn()
            self._laid_out = kernels.mkldnn_reorder_conv2d_weight(weight, *self._how, list(x.shape))
        return self._laid_out

    def _same_kind(self, x: Tensor, other: Tensor) -> bool:
        """Whether ``other`` has the shape and type of the convolution of ``x``."""
        padding, stride, dilation, _ = self._how
        sides = zip(x.shape[2:], self.conv.kernel_size, padding, stride, dilation, strict=True)
        size = [(side + 2 * pad - spread * (kernel - 1) - 1) // step + 1 for side, kernel, pad, step, spread in sides]
        return other.dtype == x.dtype and other.shape == (x.shape[0], self.conv.out_channels, *size)


def in_one_pass(frozen: GraphModule) -> GraphModule:
    """``frozen`` of ``folded``, on a CPU, with fewer passes over its activations; it is changed.

    A BatchNorm that could not be folded becomes a convolution of each channel with one weight, its slope, and a bias:
    so it, too, takes its ReLU along. Residual additions go into the convolution that ends their branch, and the ReLU
    behind them as well. A convolution that takes nothing along has its weights laid out like the others'.
    """
    graph = frozen.graph
    for node in list(graph.nodes):
        layer = _layer(frozen, node)
        if type(layer) is nn.BatchNorm2d:
            frozen.add_submodule(str(node.target), _as_convolution(layer))
    for node in list(graph.nodes):
        conv = _convolution(frozen, node)
        if conv is None:
            continue
        chain, other = [node], None
        following = _only_user(node)
        if following is not None and _is_sum(following, node):
            other = next(argument for argument in following.args if argument is not node)
            chain.append(following)
            following = _only_user(following)
        relu = following is not None and _is_relu(frozen, following)
        if relu:
            assert following is not None
            chain.append(following)
        frozen.add_submodule(f"one_pass_{node.name}", OnePass(conv, relu))
        with graph.inserting_before(chain[-1]):  # where all that it takes has been computed
            inputs = (node.args[0],) if other is None else (node.args[0], other)
            made = graph.call_module(f"one_pass_{node.name}", inputs)
        chain[-1].replace_all_uses_with(made)
        for each in reversed(chain):
            graph.erase_node(each)
    frozen.delete_all_unused_submodules()
    frozen.recompile()
    return frozen


def _layer(module: GraphModule, node: Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _convolution(module: GraphModule, node: Node) -> nn.Conv2d | None:
    """The node's layer if it is a convolution of the kernel's kind: padded by numbers, with zeros."""
    layer = _layer(module, node)
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    return layer


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: Node, of: Node) -> bool:
    """Whether it adds ``of`` and another tensor of the graph."""
    two = len(node.args) == 2 and not node.kwargs and all(isinstance(argument, Node) for argument in node.args)
    adds = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    return two and adds and node.args.count(of) == 1


def _is_relu(module: GraphModule, node: Node) -> bool:
    if node.op == "call_function":
        return node.target in (F.relu, F.relu_, torch.relu, torch.relu_)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(_layer(module, node)) is nn.ReLU


def _as_convolution(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The line of each channel that ``norm`` is in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    slope = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        slope = slope * norm.weight
    offset = -norm.running_mean * slope
    if norm.bias is not None:
        offset = offset + norm.bias
    channels = norm.num_features
    conv = nn.Conv2d(channels, channels, 1, groups=channels)
    conv.weight = nn.Parameter(slope.view(channels, 1, 1, 1), requires_grad=False)
    conv.bias = nn.Parameter(offset, requires_grad=False)
    return conv.to(torch.bfloat16)
