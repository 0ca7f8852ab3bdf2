"""Small plain networks of our own for the smoke protocol: a full distillation takes minutes on two CPU cores.

convnet<w>: three times conv3x3-BN-ReLU with w, 2w and 4w channels, a 2x2 max-pool after the first two, global average
pool, linear. Convolutions are drawn from N(0, 2 / (k * k * outputs)) by variance, as in the wide ResNets.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("convnet8", "convnet16", "convnet32")


def build(name: str, classes: int, channels: int) -> nn.Module:
    """The network called ``name``, one of ``NAMES``: convnet<base width>."""
    return ConvNet(int(name.removeprefix("convnet")), classes, channels)


class ConvNet(nn.Module):
    """[b, C, H, W] -> [b, K], H and W at least 4; stages at H, H/2 and H/4 with w, 2w and 4w channels."""

    def __init__(self, width: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.classifier = nn.Linear(4 * width, classes)
        for convolution in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], pooled features [b, 4w] and the outputs of the three stages (after ReLU, before pooling)."""
        first = F.relu(self.bn1(self.conv1(images)), inplace=True)
        second = F.relu(self.bn2(self.conv2(F.max_pool2d(first, 2))), inplace=True)
        third = F.relu(self.bn3(self.conv3(F.max_pool2d(second, 2))), inplace=True)
        pooled = F.adaptive_avg_pool2d(third, 1).flatten(1)
        return self.classifier(pooled), pooled, [first, second, third]
