"""VGG-8, -11 and -13 with BatchNorm and one linear layer, for small images.

Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), table 1, in the form that distillation uses
since Tian et al., "Contrastive Representation Distillation" (ICLR 2020). Modules are named as in zju-vipa/CMI,
datafree/models/classifiers/vgg.py, so that its checkpoints load by key.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

NAMES = ("vgg8", "vgg11", "vgg13")

_WIDTHS = (64, 128, 256, 512, 512)
_DEPTHS = {"vgg8": (1, 1, 1, 1, 1), "vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2)}


def build(name: str, classes: int, channels: int) -> nn.Module:
    """The VGG called ``name``, one of ``NAMES``."""
    return VGG(_DEPTHS[name], classes, channels)


class VGG(nn.Module):
    """[b, C, H, W] -> [b, K]; five blocks of 3x3 convolutions with 64, 128, 256, 512 and 512 channels.

    A 2x2 max-pool follows blocks 0, 1 and 2, and block 3 only if the images are 64 pixels high (the published form).
    A side of one pixel is not pooled further, so that 4x4 and 8x8 images work, too.
    Initialisation: convolutions N(0, 2 / (k * k * outputs)) by variance, linear N(0, 0.01) by deviation, biases 0.
    """

    def __init__(self, depths: tuple[int, ...], classes: int, channels: int) -> None:
        super().__init__()
        inputs = (channels, *_WIDTHS[:-1])
        blocks = [_block(*shape) for shape in zip(inputs, _WIDTHS, depths, strict=True)]
        self.block0, self.block1, self.block2, self.block3, self.block4 = blocks
        self.classifier = nn.Linear(_WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [b, K], pooled features [b, 512] and the outputs of the five blocks (after ReLU, before pooling)."""
        x = images
        stages = []
        for index, block in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
            out = F.relu(block(x), inplace=True)
            stages.append(out)
            x = _pooled(out, images, index)
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(pooled), pooled, stages


@fx.wrap  # one step to whoever traces the network, for it asks for shapes
def _pooled(out: Tensor, images: Tensor, index: int) -> Tensor:
    """What goes on from block ``index`` of five."""
    pool = index < 3 or (index == 3 and images.shape[2] == 64)
    return F.max_pool2d(out, 2) if pool and min(out.shape[2:]) > 1 else out


def _block(inputs: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` times conv-BN with ReLU in between; the last ReLU is the caller's."""
    layers: list[nn.Module] = []
    for index in range(depth):
        if index:
            layers.append(nn.ReLU(inplace=True))
        layers += [nn.Conv2d(width if index else inputs, width, 3, padding=1), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers)
