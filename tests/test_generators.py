from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_bench import generators
from dfkd_bench.generators import ConvBody, DeepConvBody, Generator, LargeGenerator

# Filled by ``fill``, train mode, z = sin(0.1 * arange) [4, 256], computed on the modules of zju-vipa/CMI: mean and
# unbiased deviation of all pixels, the first four pixels of the first row, the last two of the last row.
GOLDEN = {
    Generator: (
        0.500863168581995,
        0.029065145731389824,
        (0.5156284485299585, 0.5258027544152241, 0.5271141466393694, 0.5230829843059428),
        (0.46588101805204646, 0.4732469447832571),
    ),
    LargeGenerator: (
        0.5008843433399983,
        0.026126997137748038,
        (0.5045038828293186, 0.49878582653680575, 0.4954886806543301, 0.4909736902944329),
        (0.5225646068328449, 0.5063722377960995),
    ),
}


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


def waves() -> Tensor:
    return (0.1 * torch.arange(4 * 256, dtype=torch.float64)).sin().view(4, 256)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_images(kind: type[Generator]) -> None:
    generator = kind(256, (3, 32, 32)).double()
    fill(generator)
    mean, deviation, first, last = GOLDEN[kind]
    with torch.no_grad():
        images = generator(waves())
    got = [float(images.mean()), float(images.std()), *images[0, 0, 0, :4].tolist(), *images[3, 2, 31, -2:].tolist()]
    assert got == pytest.approx([mean, deviation, *first, *last], rel=1e-10)


@pytest.mark.parametrize(
    ("kind", "latent_dim", "side", "count"),
    [
        (Generator, 256, 32, 2_328_899),
        (Generator, 512, 32, 4_426_051),
        (Generator, 256, 64, 8_644_931),
        (LargeGenerator, 256, 32, 4_581_955),
        (LargeGenerator, 512, 32, 8_776_259),
    ],
)
def test_parameter_counts(kind: type[Generator], latent_dim: int, side: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(kind(latent_dim, (3, side, side))) == count


def test_parameter_count_of_the_shared_body() -> None:
    assert parameters(ConvBody((3, 32, 32))) == 223_555


@pytest.mark.parametrize(("inputs", "count"), [(128, 444_995), (100, 729_475 - 316_736)])
def test_parameter_counts_of_the_deep_body(inputs: int, count: int) -> None:
    assert parameters(DeepConvBody((3, 224, 224), inputs=inputs)) == count


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 30, 30), (2, 9, 14)], ids=str)
@pytest.mark.parametrize("kind", [Generator, LargeGenerator])
def test_images_have_the_shape_asked_for(kind: type[Generator], shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        assert kind(16, shape, width=8)(torch.empty(2, 16)).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 64, 64), (3, 70, 100)], ids=str)
def test_deep_body_makes_images_of_the_shape_asked_for(shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        body = DeepConvBody(shape, width=8)
        assert body(torch.empty(2, *body.in_shape)).shape == (2, *shape)


def test_deep_body_starts_from_a_sixteenth_of_the_side() -> None:
    assert DeepConvBody((3, 224, 224)).in_shape == (128, 14, 14)


@pytest.mark.parametrize("kind", [Generator, LargeGenerator])
def test_pixels_lie_strictly_between_0_and_1(kind: type[Generator]) -> None:
    torch.manual_seed(0)
    images = kind(8, (3, 16, 16), 8)(torch.randn(16, 8)).detach()
    assert 0 < float(images.min()) < 0.5 < float(images.max()) < 1


def test_deep_body_pixels_lie_strictly_between_0_and_1() -> None:
    torch.manual_seed(0)
    images = DeepConvBody((3, 32, 32), width=8)(torch.randn(16, 16, 2, 2)).detach()
    assert 0 < float(images.min()) < 0.5 < float(images.max()) < 1


@pytest.mark.parametrize("kind", [ConvBody, DeepConvBody])
def test_bodies_take_flat_rows_and_maps_alike(kind: type[ConvBody | DeepConvBody]) -> None:
    torch.manual_seed(0)
    body = kind((3, 32, 32), 8).eval()
    flat = torch.randn(2, body.in_features)
    torch.testing.assert_close(body(flat), body(flat.view(2, *body.in_shape)), rtol=0, atol=0)


def test_cropping_keeps_the_upper_left_of_the_full_image() -> None:
    torch.manual_seed(0)
    full, cropped = ConvBody((1, 12, 12), 4), ConvBody((1, 10, 11), 4)
    cropped.load_state_dict(full.state_dict())
    x = torch.randn(2, full.in_features)
    torch.testing.assert_close(cropped(x), full(x)[:, :, :10, :11])


def test_a_constant_per_channel_in_the_linear_bias_leaves_the_images_unchanged() -> None:
    torch.manual_seed(0)
    generator, z = Generator(8, (1, 8, 8), 4).double(), torch.randn(5, 8, dtype=torch.float64)
    before = generator(z)
    channels, height, width = generator.body.in_shape
    with torch.no_grad():
        generator.project.bias.add_(torch.randn(channels, dtype=torch.float64).repeat_interleave(height * width))
    torch.testing.assert_close(generator(z), before)


def test_norm_is_the_layer_right_after_the_reshape() -> None:
    generator = Generator(8, (1, 8, 8), 4)
    seen: list[Tensor] = []
    generator.body.norm.register_forward_pre_hook(lambda _norm, inputs: seen.append(inputs[0]))
    z = torch.randn(3, 8)
    generator(z)
    torch.testing.assert_close(seen[0], generator.project(z).view(3, 8, 2, 2), rtol=0, atol=0)


def test_hidden_features_have_the_shapes_of_the_ladder() -> None:
    hidden = LargeGenerator(8, (3, 32, 32), 4).body.hidden(torch.randn(2, 16 * 64))
    assert [tuple(h.shape[1:]) for h in hidden] == [(16, 8, 8), (8, 16, 16), (4, 32, 32)]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_images_decoded_from_a_hidden_feature_are_those_of_forward(level: int) -> None:
    body = ConvBody((3, 16, 16), 4).eval()
    x = torch.randn(2, body.in_features)
    torch.testing.assert_close(body.images(body.hidden(x)[level], level), body(x), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_out_channels_are_those_of_the_images(channels: int) -> None:
    assert Generator(8, (channels, 8, 8), 4).out_channels == channels


def test_every_parameter_gets_a_gradient() -> None:
    generator = Generator(8, (1, 8, 8), 4)
    generator(torch.randn(4, 8)).square().sum().backward()
    assert [key for key, p in generator.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("bias", [True, False])
def test_the_merged_kernel_is_the_convolution_of_the_up_sampled_map(bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    merged = F.conv_transpose2d(x, generators._merged(conv.weight), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(merged, conv(F.interpolate(x, scale_factor=2.0)), rtol=1e-12, atol=1e-12)


def test_bf16_takes_the_merged_kernel_and_its_gradients_are_those_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    x = torch.randn(4, 8, 4, 4, requires_grad=True)
    weights = torch.randn(4, 6, 8, 8)
    plain = torch.autograd.grad((generators.upsampled_conv(x, conv) * weights).sum(), (x, conv.weight))
    monkeypatch.setattr(generators.F, "interpolate", None)  # the plain way can't be taken
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = generators.upsampled_conv(x, conv)
        assert images.dtype == torch.bfloat16
        fast = torch.autograd.grad((images * weights).sum(), (x, conv.weight))
    for wanted, got in zip(plain, fast, strict=True):
        assert F.cosine_similarity(wanted.flatten(), got.flatten(), dim=0) > 0.9999


def test_fp32_keeps_the_written_order_of_layers() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    x = torch.randn(4, 8, 4, 4)
    assert torch.equal(generators.upsampled_conv(x, conv), conv(F.interpolate(x, scale_factor=2.0)))


@pytest.mark.parametrize("channels", [1, 3])
def test_in_bf16_activations_and_gradients_stay_channels_last(channels: int) -> None:
    body = ConvBody((channels, 16, 16), width=8).to(memory_format=torch.channels_last)
    seen: list[torch.Tensor] = []

    def watch(_norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0].detach())
        inputs[0].register_hook(seen.append)

    body.stages[1].norm.register_forward_pre_hook(watch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = body(torch.randn(4, body.in_features))
    (images * torch.randn(images.shape)).sum().backward()
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [True, True]
