"""ResNet-18, -34 and -50 in the form used for 32x32 images: a 3x3 stem of stride 1 and no max-pool.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1, with the stem changed for small images
as data-free distillation does since DAFL (ICCV 2019). Modules are named as in zju-vipa/CMI,
datafree/models/classifiers/resnet.py, so that its checkpoints load by key. Initialisation: PyTorch's defaults.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("resnet18", "resnet34", "resnet50")


def build(name: str, classes: int, channels: int) -> nn.Module:
    """The ResNet called ``name``, one of ``NAMES``."""
    block, depths = _FORMS[name]
    return ResNet(block, depths, classes, channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [b, inputs, H, W] -> [b, width, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [b, inputs, H, W] -> [b, 4 * width, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """[b, C, H, W] -> [b, K]; stages at H, H/2, H/4 and H/8 with 64, 128, 256, 512 (times 4: ResNet-50) channels."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: tuple[int, int, int, int], classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        grown = block.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = _stage(block, 64 * grown, 128, depths[1], stride=2)
        self.layer3 = _stage(block, 128 * grown, 256, depths[2], stride=2)
        self.layer4 = _stage(block, 256 * grown, 512, depths[3], stride=2)
        self.linear = nn.Linear(512 * grown, classes)

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer, whose key in the state dict is ``linear``."""
        return self.linear

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], pooled features [b, F] and the outputs of the four stages (after their last ReLU)."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(pooled), pooled, stages


_FORMS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def _stage(block: type[BasicBlock | Bottleneck], inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
    first = block(inputs, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(depth - 1)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Empty, that is the identity, unless the shape changes; then a 1x1 convolution and BatchNorm."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
