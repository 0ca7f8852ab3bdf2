"""ResNet-18, -34 and -50 and MobileNetV2 for large images (224x224): a strided stem and an early pooling.

Architecture and initialisation are torchvision's; a ResNet's parameters are named as there, so that its ImageNet
checkpoints load by key. The published ImageNet tables mean these networks; those of ``resnet.py`` are for 32x32.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

NAMES = ("resnet18_imagenet", "resnet34_imagenet", "resnet50_imagenet", "mobilenetv2_imagenet")


def build(name: str, classes: int, channels: int) -> nn.Module:
    """The network called ``name``, one of ``NAMES``."""
    if name == "mobilenetv2_imagenet":
        return Mobile(classes, channels)
    block, depths = _FORMS[name]
    return Residual(block, depths, classes, channels)


class Residual(ResNet):
    """torchvision's ResNet with the suite's form around it; ``fc`` is the classifier."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: list[int], classes: int, channels: int
    ) -> None:
        super().__init__(block, depths, num_classes=classes)
        if channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], pooled features [b, F] and the outputs of the four stages (after their last ReLU)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        pooled = self.avgpool(x).flatten(1)
        return self.fc(pooled), pooled, stages


class Mobile(nn.Module):
    """torchvision's MobileNetV2: ``body`` holds its layers, ``classifier`` its last one, the dropout between is kept.

    Stages are what leaves each resolution: after 1/2, 1/4, 1/8, 1/16 and 1/32 of the side.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        whole = MobileNetV2(num_classes=classes)
        self.body, (self.dropout, self.classifier) = whole.features, whole.classifier
        if channels != 3:
            self.body[0][0] = nn.Conv2d(channels, 32, kernel_size=3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(self.body[0][0].weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], pooled features [b, 1280] and the outputs of the five stages."""
        x, stages = images, []
        for index, layer in enumerate(self.body):
            x = layer(x)
            if index in _STAGE_ENDS:
                stages.append(x)
        pooled = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(self.dropout(pooled)), pooled, stages


_STAGE_ENDS = (1, 3, 6, 13, 18)
_FORMS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18_imagenet": (BasicBlock, [2, 2, 2, 2]),
    "resnet34_imagenet": (BasicBlock, [3, 4, 6, 3]),
    "resnet50_imagenet": (Bottleneck, [3, 4, 6, 3]),
}
