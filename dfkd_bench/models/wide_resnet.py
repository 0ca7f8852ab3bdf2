"""Wide residual networks WRN-d-w, pre-activation form, without dropout.

Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016), table 1; in data-free distillation since ZSKT (NeurIPS
2019). Modules are named as in zju-vipa/CMI, datafree/models/classifiers/wresnet.py, so that its checkpoints load.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("wrn16_1", "wrn16_2", "wrn40_1", "wrn40_2")


def build(name: str, classes: int, channels: int) -> nn.Module:
    """The network called ``name``, one of ``NAMES``: wrn<depth>_<widening>."""
    depth, widening = name.removeprefix("wrn").split("_")
    return WideResNet(int(depth), int(widening), classes, channels)


class Block(nn.Module):
    """BN-ReLU-conv twice beside a shortcut: [b, inputs, H, W] -> [b, outputs, H/stride, W/stride].

    Where the width stays, the shortcut is the raw input. Where it changes, the shortcut is a 1x1 convolution of the
    *activated* input, without BatchNorm. Hence the first block of WRN-d-1 (16 -> 16) has no shortcut convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))


class Group(nn.Module):
    """``depth`` blocks of one width; the first changes width and side."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int) -> None:
        super().__init__()
        first = Block(inputs, outputs, stride)
        self.layer = nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """[b, C, H, W] -> [b, K]; stages at H, H/2 and H/4 with 16w, 32w and 64w channels.

    Initialisation: convolutions N(0, 2 / (k * k * outputs)) by variance, BatchNorm 1 and 0, linear bias 0.
    """

    def __init__(self, depth: int, widening: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16 * widening, 32 * widening, 64 * widening)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Group(16, widths[0], blocks, stride=1)
        self.block2 = Group(widths[0], widths[1], blocks, stride=2)
        self.block3 = Group(widths[1], widths[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer, whose key in the state dict is ``fc``."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], pooled features [b, F] and the outputs of the three groups (before any BN or ReLU)."""
        x = self.conv1(images)
        stages = []
        for group in (self.block1, self.block2, self.block3):
            x = group(x)
            stages.append(x)
        pooled = F.adaptive_avg_pool2d(F.relu(self.bn1(x), inplace=True), 1).flatten(1)
        return self.fc(pooled), pooled, stages
