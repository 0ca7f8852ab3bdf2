from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.errors import UserError
from dfkd_bench.models import build_model, model_names

# Trainable parameters at 10, 100 and 200 classes, BatchNorm layers, their channels, width of the last feature.
# Counted on the modules of zju-vipa/CMI (datafree/models/classifiers/).
PUBLISHED = {
    "resnet18": (11_173_962, 11_220_132, 11_271_432, 20, 4_800, 512),
    "resnet34": (21_282_122, 21_328_292, 21_379_592, 36, 8_512, 512),
    "resnet50": (23_520_842, 23_705_252, 23_910_152, 53, 26_560, 2_048),
    "wrn16_1": (175_066, 180_916, 187_416, 13, 464, 64),
    "wrn16_2": (691_674, 703_284, 716_184, 13, 912, 128),
    "wrn40_1": (563_930, 569_780, 576_280, 37, 1_360, 64),
    "wrn40_2": (2_243_546, 2_255_156, 2_268_056, 37, 2_704, 128),
    "vgg8": (3_918_858, 3_965_028, 4_016_328, 5, 1_472, 512),
    "vgg11": (9_231_114, 9_277_284, 9_328_584, 8, 2_752, 512),
    "vgg13": (9_416_010, 9_462_180, 9_513_480, 10, 2_944, 512),
}

# Filled by ``fill``, eval mode, 10 classes, images sin(0.01 * arange) [2, 3, side, side], computed on CMI's modules:
# the first four logits of image 0, the first two of image 1, the norm of image 0's feature, the BatchNorm regulariser.
GOLDEN = {
    "resnet18": (
        (-0.7785892697658151, 0.6671873036866672, -0.5349495355365228, 0.38653033204577447),
        (-0.7789111100140338, 0.667492336870631),
        14.843245768615338,
        345.31879203023817,
    ),
    "resnet34": (
        (-0.2757448057279213, 0.05570508956781551, 0.18129777831250632, -0.4299459309354615),
        (-0.27630805423540394, 0.05624074083661351),
        38.55582953857823,
        644.1885592080305,
    ),
    "wrn16_1": (
        (-0.14151720982846067, -0.15871696766353233, 0.018732531417929008, 0.17216242445336533),
        (-0.14315864329730266, -0.16057363102427064),
        0.4888050180125868,
        80.32891695353031,
    ),
    "wrn16_2": (
        (-0.10125013650495172, -0.0883692569865816, 0.23703751025006115, -0.2503791739889689),
        (-0.100020990467061, -0.08964154880082954),
        1.1402321908615625,
        115.31768675508341,
    ),
    "wrn40_1": (
        (-0.1296589237005131, -0.1646049700012216, 0.0022597327123622087, 0.16514045623468082),
        (-0.13662283465825342, -0.15828901485889588),
        0.4039592105291574,
        232.00490493336537,
    ),
    "wrn40_2": (
        (-0.09348823289579865, -0.09203912207567719, 0.23436127501539805, -0.2430006044747262),
        (-0.09150621210725068, -0.0942640618821659),
        1.0785052735045493,
        336.96482198348406,
    ),
    "vgg11": (
        (-0.402223502459948, 0.3987415091060604, -0.37612383950093725, 0.33833061236042405),
        (-0.4022234739385123, 0.39874148030220596),
        0.6675437652475236,
        150.90207510074353,
    ),
}
GOLDEN_64 = {
    "resnet18": (
        (-0.7788456801478528, 0.6674119161478724, -0.5351409275571453, 0.38668729149836567),
        345.4385142295599,
    ),
    "vgg11": (
        (-0.40222154164648305, 0.3987393336135979, -0.37612146310734623, 0.33832805011592404),
        151.04120342676757,
    ),
}

SMALL = ("convnet8", "wrn16_1", "vgg8")  # one of each family that is quick to run in these tests


def fill(model: nn.Module) -> None:
    """Weights that do not depend on a random stream or on the order of the modules."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                n = module.weight.numel()
                values = torch.arange(n, dtype=torch.float64).sin() * (2 * module.weight.shape[0] / n) ** 0.5
                module.weight.copy_(values.view_as(module.weight))
                if module.bias is not None:
                    module.bias.copy_(0.01 * torch.arange(module.bias.numel(), dtype=torch.float64).cos())
            elif isinstance(module, nn.BatchNorm2d):
                k = torch.arange(module.num_features, dtype=torch.float64)
                module.weight.copy_(1 + 0.1 * k.sin())
                module.bias.copy_(0.05 * k.cos())
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.1 * (k + 1).sin())
                module.running_var.copy_(1 + 0.2 * k.cos())


def filled(name: str) -> Any:
    model: Any = build_model(name, 10).double().eval()
    fill(model)
    return model


def waves(side: int) -> Tensor:
    return (0.01 * torch.arange(2 * 3 * side * side, dtype=torch.float64)).sin().view(2, 3, side, side)


def features_and_regulariser(model: Any, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Logits, penultimate features and the sum over BatchNorm inputs of the distances of mean and biased variance."""
    terms: list[float] = []

    def measure(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), correction=0)
        terms.append(float((norm.running_mean - mean).norm() + (norm.running_var - variance).norm()))

    handles = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        logits, feature, _ = model.features(images)
    for handle in handles:
        handle.remove()
    return logits, feature, sum(terms)


def on_meta(name: str, classes: int, channels: int = 3) -> Any:
    """The model without numbers: enough for counting, and free."""
    with torch.device("meta"):
        return build_model(name, classes, channels)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_architectures(name: str) -> None:
    assert tuple(parameters(on_meta(name, classes)) for classes in (10, 100, 200)) == PUBLISHED[name][:3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_batchnorm_layers_and_their_channels(name: str) -> None:
    widths = [m.num_features for m in on_meta(name, 10).modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(widths), sum(widths)) == PUBLISHED[name][3:5]


@pytest.mark.parametrize("name", PUBLISHED)
def test_classifier_is_the_last_linear_layer_and_registered_once(name: str) -> None:
    model = on_meta(name, 10)
    assert isinstance(model.classifier, nn.Linear)
    assert model.classifier.in_features == PUBLISHED[name][5]
    assert sum(tuple(value.shape) == (10, PUBLISHED[name][5]) for value in model.state_dict().values()) == 1


@pytest.mark.parametrize(("width", "count"), [(8, 6_418), (16, 24_346), (32, 94_762)])
def test_convnet_parameter_counts(width: int, count: int) -> None:
    assert parameters(on_meta(f"convnet{width}", 10)) == count


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_forward_pass(name: str) -> None:
    first, second, norm, regulariser = GOLDEN[name]
    logits, feature, measured = features_and_regulariser(filled(name), waves(32))
    got = [*logits[0, :4].tolist(), *logits[1, :2].tolist(), float(feature[0].norm()), measured]
    assert got == pytest.approx([*first, *second, norm, regulariser], rel=1e-9)


@pytest.mark.parametrize("name", GOLDEN_64)
def test_golden_forward_pass_at_64_pixels(name: str) -> None:
    first, regulariser = GOLDEN_64[name]
    logits, _, measured = features_and_regulariser(filled(name), waves(64))
    assert [*logits[0, :4].tolist(), measured] == pytest.approx([*first, regulariser], rel=1e-9)


def test_single_precision_agrees_with_the_golden_forward_pass() -> None:
    first, _, _, regulariser = GOLDEN["wrn40_2"]
    logits, _, measured = features_and_regulariser(filled("wrn40_2").float(), waves(32).float())
    assert [*logits[0, :4].tolist(), measured] == pytest.approx([*first, regulariser], rel=2e-5)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet18", ("conv1.weight", "bn1.running_mean", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias")),
        ("resnet18", ("layer2.0.shortcut.1.running_var", "linear.weight", "linear.bias")),
        ("resnet50", ("layer1.0.shortcut.0.weight", "layer3.5.conv3.weight", "layer3.5.bn3.weight", "linear.bias")),
        ("wrn40_2", ("conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.running_var")),
        ("wrn40_2", ("block2.layer.0.conv1.weight", "bn1.weight", "fc.weight", "fc.bias")),
        ("vgg11", ("block0.0.weight", "block0.0.bias", "block0.1.running_mean", "block3.3.weight", "block3.4.bias")),
        ("vgg11", ("block4.4.weight", "classifier.weight", "classifier.bias")),
    ],
)
def test_state_dict_has_the_keys_of_released_checkpoints(name: str, keys: tuple[str, ...]) -> None:
    assert set(keys) <= set(on_meta(name, 10).state_dict())


def test_first_block_of_a_network_of_widening_1_keeps_its_raw_shortcut() -> None:
    assert "block1.layer.0.convShortcut.weight" not in on_meta("wrn16_1", 10).state_dict()


@pytest.mark.parametrize("name", model_names())
def test_features_agree_with_forward(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_model(name, 5, channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        logits, feature, _ = model.features(images)
        torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
        torch.testing.assert_close(model.classifier(feature), logits)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(64, 32), (128, 16), (256, 8), (512, 4)]),
        ("resnet50", [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
        ("wrn40_2", [(32, 32), (64, 16), (128, 8)]),
        ("vgg11", [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
        ("convnet16", [(16, 32), (32, 16), (64, 8)]),
    ],
)
def test_stages_have_the_shapes_of_the_architecture(name: str, shapes: list[tuple[int, int]]) -> None:
    stages = on_meta(name, 10).eval().features(torch.empty(1, 3, 32, 32, device="meta"))[2]
    assert [(stage.shape[1], stage.shape[2]) for stage in stages] == shapes


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", model_names())
def test_logits_for_any_side_and_any_number_of_channels(name: str, channels: int, side: int) -> None:
    images = torch.empty(2, channels, side, side, device="meta")
    assert on_meta(name, 7, channels).eval()(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["vgg11", "convnet8"])
def test_four_pixels_are_enough(name: str) -> None:
    assert build_model(name, 3, 1).eval()(torch.zeros(1, 1, 4, 4)).shape == (1, 3)


@pytest.mark.parametrize(("side", "last"), [(32, 4), (48, 6), (64, 4)])
def test_vgg_pools_after_block_3_only_at_64_pixels(side: int, last: int) -> None:
    stages = on_meta("vgg8", 10).eval().features(torch.empty(1, 3, side, side, device="meta"))[2]
    assert stages[-1].shape[2] == last


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_model(name, 4, 1)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_survives_to_the_last_stage(name: str) -> None:
    model: Any = build_model(name, 4).eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        stages = model.features(images)[2]
    assert all(stage.is_contiguous(memory_format=torch.channels_last) for stage in stages)


@pytest.mark.parametrize("name", ["wrn16_2", "vgg8", "convnet32"])
def test_convolutions_start_with_the_variance_of_their_fan_out(name: str) -> None:
    torch.manual_seed(0)
    convolutions = [m for m in build_model(name, 10).modules() if isinstance(m, nn.Conv2d)]
    convolutions = [m for m in convolutions if m.in_channels != m.out_channels]  # tells fan-out from fan-in
    largest = max(convolutions, key=lambda m: m.weight.numel())
    expected = (2 / (largest.kernel_size[0] ** 2 * largest.out_channels)) ** 0.5
    assert float(largest.weight.detach().std()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", ["wrn16_1", "vgg8"])
def test_linear_bias_starts_at_zero(name: str) -> None:
    model: Any = build_model(name, 10)
    assert model.classifier.bias.detach().abs().max() == 0


def test_vgg_linear_weight_starts_with_deviation_a_hundredth() -> None:
    torch.manual_seed(0)
    model: Any = build_model("vgg8", 100)
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.03)


def test_names_are_listed() -> None:
    assert {*PUBLISHED, "convnet8", "convnet16", "convnet32"} <= set(model_names())


def test_listing_names_imports_neither_torch_nor_a_model() -> None:
    code = (
        "import sys; from dfkd_bench.models import model_names; assert model_names();"
        "loaded = [m for m in sys.modules if m == 'torch' or m.startswith('dfkd_bench.models.')]; sys.exit(str(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_building_imports_only_the_file_that_holds_the_name() -> None:
    code = (
        "import sys; from dfkd_bench.models import build_model; build_model('convnet8', 2);"
        "sys.exit(str([m for m in sys.modules if m.startswith('dfkd_bench.models.')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "['dfkd_bench.models.convnet']"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model 'resnet_18': did you mean 'resnet18'\? Known: convnet16"):
        build_model("resnet_18", 10)


def test_unknown_name_suggests_a_plugins_model() -> None:
    with pytest.raises(UserError, match="did you mean 'mobile_tiny'"):
        build_model("mobile_tny", 10, extra={"mobile_tiny": lambda classes, channels: nn.Linear(channels, classes)})


def test_a_plugins_model_is_built_with_classes_and_channels() -> None:
    extra = {"mine": lambda classes, channels: build_model("convnet8", classes, channels)}
    model = build_model("mine", 7, 2, extra).eval()
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 7)


def test_a_plugins_model_must_not_hide_a_built_in_one() -> None:
    with pytest.raises(UserError, match="'vgg8'"):
        build_model("wrn16_1", 10, extra={"vgg8": lambda classes, channels: nn.Linear(channels, classes)})


# --- Networks for large images ----------------------------------------------------------------------------------------

IMAGENET = {  # parameters at 1000 classes, as torchvision states them
    "resnet18_imagenet": 11_689_512,
    "resnet34_imagenet": 21_797_672,
    "resnet50_imagenet": 25_557_032,
    "mobilenetv2_imagenet": 3_504_872,
}


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_have_torchvisions_parameters(name: str) -> None:
    assert parameters(on_meta(name, 1000)) == IMAGENET[name]


@pytest.mark.parametrize("name", ["resnet18_imagenet", "mobilenetv2_imagenet"])
def test_imagenet_networks_compute_what_torchvision_computes(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    ours: Any = build_model(name, 7).eval()
    theirs: Any = getattr(torchvision.models, {"r": "resnet18", "m": "mobilenet_v2"}[name[0]])(num_classes=7).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_torchvisions_checkpoints_load_by_key() -> None:
    import torchvision

    ours, theirs = on_meta("resnet50_imagenet", 1000), torchvision.models.resnet50
    with torch.device("meta"):
        assert ours.state_dict().keys() == theirs().state_dict().keys()
