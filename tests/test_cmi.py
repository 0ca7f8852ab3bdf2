from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dfkd_bench import augment, data, plugins, teachers
from dfkd_bench.augment import random_resized_crop_flip
from dfkd_bench.checkpoint import load_tree, save_tree
from dfkd_bench.compute import Compute
from dfkd_bench.errors import UserError
from dfkd_bench.generators import Generator
from dfkd_bench.job import Job
from dfkd_bench.losses import contrastive, contrastive_rows
from dfkd_bench.method import Progress, Task
from dfkd_bench.methods import cmi
from dfkd_bench.methods.cmi import Bank, Cmi, CmiConfig, feature_layers, reinitialize, spatial_means
from dfkd_bench.models import build_model
from dfkd_bench.run import Place, run
from dfkd_bench.statistics import BatchNormMatcher
from dfkd_bench.suite import expand, make_suite

B, STEPS = 12, 3
At = Callable[..., Progress]
TINY = {"synthesis_batch_size": B, "latent_dim": 8, "generator_steps": STEPS, "generator_width": 4}
TINY |= {"bank_size": 30, "negatives": 16, "contrast_width": 8}


def new_method(task: Task, **fields: Any) -> Cmi:
    torch.manual_seed(0)
    return Cmi(CmiConfig(**(TINY | fields)), task)


# -- Random resized crop --------------------------------------------------------------------------------------------


def every_part(height: int, width: int) -> tuple[Tensor, ...]:
    """Top, height, left, width and flip of every part of an image."""
    spans = [
        [(start, size) for size in range(1, side + 1) for start in range(side - size + 1)] for side in (height, width)
    ]
    cases = [(*down, *right, flip) for down, right in itertools.product(*spans) for flip in (0, 1)]
    return tuple(torch.tensor(column) for column in zip(*cases, strict=True))


def enlarged(images: Tensor, part: tuple[Tensor, ...]) -> Tensor:
    top, high, left, wide, flip = part
    return augment._enlarged(images, (top, high), (left, wide), flip.bool())


def one_by_one(images: Tensor, part: tuple[Tensor, ...]) -> Tensor:
    """The same with the operations that everybody knows, image by image."""
    out = []
    for image, (top, high, left, wide, flip) in zip(images, zip(*(p.tolist() for p in part), strict=True), strict=True):
        piece = image[None, :, top : top + high, left : left + wide]
        resized = F.interpolate(piece, images.shape[2:], mode="bilinear", align_corners=True)[0]
        out.append(resized.flip(2) if flip else resized)
    return torch.stack(out)


def test_enlarging_is_bilinear_interpolation_with_aligned_corners() -> None:
    part = every_part(5, 4)
    images = torch.rand(len(part[0]), 2, 5, 4)
    torch.testing.assert_close(enlarged(images, part), one_by_one(images, part))


def test_the_gradient_of_enlarging() -> None:
    part = every_part(4, 5)
    images = torch.rand(len(part[0]), 2, 4, 5, requires_grad=True)
    weights = torch.rand(images.shape)
    (got,) = torch.autograd.grad(enlarged(images, part), images, weights)
    (expected,) = torch.autograd.grad(one_by_one(images, part), images, weights)
    torch.testing.assert_close(got, expected)


class Parts:
    """Sizes and places that were drawn, instead of the images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, side: int, flip: bool = True, **settings: Any) -> None:
        def watched(images: Tensor, vertical: Any, horizontal: Any, flips: Tensor) -> Tensor:
            self.top, self.high = vertical
            self.left, self.wide = horizontal
            self.flips = flips
            return images

        monkeypatch.setattr(augment, "_enlarged", watched)
        generator = torch.Generator().manual_seed(0)
        random_resized_crop_flip(torch.zeros(1, 1, 1, 1).expand(20_000, 1, side, side), flip, generator, **settings)


def test_parts_have_the_asked_area_and_aspect(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, 1000)  # so large that rounding to pixels doesn't count
    area, aspect = parts.high * parts.wide / 1e6, (parts.wide / parts.high).log()
    assert area.min().item() == pytest.approx(0.25, abs=2e-3)
    assert area.max().item() == pytest.approx(1, abs=0.02)
    assert aspect.abs().max().item() == pytest.approx(math.log(4 / 3), abs=0.01)
    assert aspect.mean().item() == pytest.approx(0, abs=0.01)
    # Parts that would not fit are drawn again, which thins out the large ones; up to 3/4 of the area all fit.
    small = area[area < 0.75]
    assert small.mean().item() == pytest.approx(0.5, abs=0.01)


def test_parts_lie_within_the_image_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, 8)
    for start, size in ((parts.top, parts.high), (parts.left, parts.wide)):
        assert (start >= 0).all()
        assert (start + size <= 8).all()
        assert torch.equal(size, size.round())
        places = start[size == 5].long().bincount()
        assert len(places) == 4
        assert places.min() > 0.85 * places.max()
    both = (parts.high == 5) & (parts.wide == 5)
    assert torch.corrcoef(torch.stack([parts.top, parts.left])[:, both])[0, 1].abs() < 0.1


@pytest.mark.parametrize(("flip", "share"), [(True, 0.5), (False, 0.0)])
def test_flips(monkeypatch: pytest.MonkeyPatch, flip: bool, share: float) -> None:
    assert Parts(monkeypatch, 8, flip).flips.float().mean().item() == pytest.approx(share, abs=0.02)


def test_the_whole_image_is_taken_if_nothing_fits() -> None:
    images = torch.rand(5, 2, 6, 6)
    same = random_resized_crop_flip(images, False, scale=(1.0, 1.0), ratio=(2.0, 3.0))
    torch.testing.assert_close(same, images)


def test_every_image_gets_a_part_of_its_own() -> None:
    image = torch.rand(1, 1, 8, 8).expand(50, -1, -1, -1)
    moved = random_resized_crop_flip(image, True, torch.Generator().manual_seed(0))
    assert len(moved.flatten(1).unique(dim=0)) > 35  # small parts of a small image may coincide


def test_the_generator_decides_the_part() -> None:
    images = torch.rand(20, 1, 8, 8)
    first, again, other = (random_resized_crop_flip(images, True, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_autocast_does_not_lower_the_precision_of_enlarging() -> None:
    images = torch.rand(20, 3, 8, 8)
    plain = random_resized_crop_flip(images, True, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = random_resized_crop_flip(images, True, torch.Generator().manual_seed(0))
    torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-6)


# -- The contrastive loss -------------------------------------------------------------------------------------------

# Golden values were computed in float64 by the released code; rows are not normalised yet.
LOCAL = torch.arange(15, dtype=torch.float64).sin().view(3, 5)
GLOBAL = torch.arange(15, dtype=torch.float64).cos().view(3, 5)
CACHED_LOCAL = (torch.arange(10, dtype=torch.float64) + 0.5).sin().view(2, 5)
CACHED_GLOBAL = (torch.arange(10, dtype=torch.float64) + 0.5).cos().view(2, 5)
QUERIES, KEYS = torch.cat([LOCAL, CACHED_LOCAL]), torch.cat([GLOBAL, CACHED_GLOBAL])
ALONE, WITH_BANK = 3.2995200160546525, 8.52242486037652
ROWS_ALONE = [3.961238956654784, 5.923058325618638, 0.014262765890536266]
ROWS_WITH_BANK = [4.222039496325555, 5.923476139889108, 0.09750339029951306, 4.569135560792229, 5.647034808951359]
GRADIENT = [-0.4299533213851457, -0.1589756729240263, 0.2581634760695644, 0.4379483157466665, 0.21508549362841925]


@pytest.mark.parametrize(("q", "k", "rows"), [(LOCAL, GLOBAL, ROWS_ALONE), (QUERIES, KEYS, ROWS_WITH_BANK)])
def test_contrastive_rows(q: Tensor, k: Tensor, rows: list[float]) -> None:
    assert contrastive_rows(q, k, 0.2).tolist() == pytest.approx(rows, rel=1e-10)


@pytest.mark.parametrize(
    ("q", "k", "temperature", "value"),
    [(LOCAL, GLOBAL, 0.2, ALONE), (QUERIES, KEYS, 0.2, WITH_BANK), (QUERIES, KEYS, 0.1, 16.317773823192134)],
)
def test_contrastive(q: Tensor, k: Tensor, temperature: float, value: float) -> None:
    """With cached rows their mean is added: the mean over all rows were 4.09 instead of 8.52."""
    assert contrastive(q, k, temperature, fresh=3).item() == pytest.approx(value, rel=1e-10)


def test_the_gradient_of_a_query() -> None:
    queries = QUERIES.clone().requires_grad_()
    contrastive(queries, KEYS, 0.2, fresh=3).backward()
    assert queries.grad is not None
    assert queries.grad[0].tolist() == pytest.approx(GRADIENT, rel=1e-9)


def test_keys_get_no_gradient() -> None:
    queries, keys = QUERIES.clone().requires_grad_(), KEYS.clone().requires_grad_()
    contrastive(queries, keys, 0.2, fresh=3).backward()
    assert keys.grad is None


def test_the_order_of_the_new_rows_does_not_matter() -> None:
    order = torch.tensor([2, 0, 1, 3, 4])
    value = contrastive(QUERIES[order], KEYS[order], 0.2, fresh=3)
    assert value.item() == pytest.approx(WITH_BANK, rel=1e-12)


def test_orthonormal_rows_that_equal_their_keys() -> None:
    rows = 3 * torch.eye(6, dtype=torch.float64)  # lengths don't count
    expected = math.log(1 + 5 * math.exp(-1 / 0.1))
    assert contrastive_rows(rows, rows, 0.1).tolist() == pytest.approx([expected] * 6, rel=1e-10)


def test_autocast_does_not_lower_the_precision_of_the_contrast() -> None:
    q, k = QUERIES.float(), KEYS.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive(q, k, 0.1, fresh=3)
    torch.testing.assert_close(inside, contrastive(q, k, 0.1, fresh=3), rtol=1e-6, atol=0)


# -- The bank -------------------------------------------------------------------------------------------------------


def numbered(first: int, count: int) -> Tensor:
    """Rows that tell their number."""
    return torch.arange(first, first + count).float().unsqueeze(1).expand(-1, 2)


def contents(bank: Bank) -> list[int]:
    return sorted(bank.draw(10**6)[:, 0].int().tolist())


@pytest.mark.parametrize("size", [12, 30, 36])  # smaller and larger than three batches, and just as large
def test_the_bank_keeps_the_newest_rows(size: int) -> None:
    bank = Bank(size, 2)
    for call in range(7):
        assert len(bank) == min(12 * call, size)
        assert contents(bank) == list(range(max(0, 12 * call - size), 12 * call))
        bank.add(numbered(12 * call, 12))


def test_a_batch_larger_than_the_bank() -> None:
    bank = Bank(5, 2)
    bank.add(numbered(0, 3))
    bank.add(numbered(3, 12))
    assert contents(bank) == [10, 11, 12, 13, 14]
    bank.add(numbered(15, 2))
    assert contents(bank) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize(("spare", "place"), [(10**9, "meta"), (2 * 4 * 60 - 1, "cpu"), (None, "meta")])
def test_the_bank_lies_on_the_device_where_there_is_room(
    spare: int | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 rows of 2 take at most half of what is free; a device whose memory is the host's has no limit."""
    monkeypatch.setattr(cmi, "spare_memory", lambda _device: spare)
    assert Bank(30, 2, torch.device("meta"))._rows.device.type == place


def test_rows_are_drawn_once_each_and_anew_every_time() -> None:
    bank = Bank(100, 2)
    bank.add(numbered(0, 60))
    first, second = (bank.draw(20)[:, 0].tolist() for _ in range(2))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second


def test_the_bank_does_not_follow_what_was_added() -> None:
    rows, bank = torch.ones(3, 2), Bank(5, 2)
    bank.add(rows)
    rows.zero_()
    assert bank.draw(5).unique().tolist() == [1]


def test_a_bank_can_be_saved_half_full_and_goes_on(tmp_path: Path) -> None:
    bank, other = Bank(30, 2), Bank(30, 2)
    bank.add(numbered(0, 20))
    save_tree(tmp_path / "bank", bank.state_dict())
    assert (tmp_path / "bank").stat().st_size < 20 * 2 * 4 + 1000
    other.load_state_dict(load_tree(tmp_path / "bank"))
    assert contents(other) == contents(bank)
    other.add(numbered(20, 15))
    assert contents(other) == list(range(5, 35))


# -- Features and networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "width"), [("wrn40_2", 2704), ("vgg11", 2752), ("wrn16_1", 464)])
def test_features_of_all_batchnorm_layers(model: str, width: int) -> None:
    layers = feature_layers(build_model(model, 10, 3))
    assert sum(layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d)) == width


def test_features_of_a_resnet_are_the_inputs_of_its_stages(make_task: Callable[..., Task]) -> None:
    teacher = build_model("resnet18", 5, 3).eval().requires_grad_(False)  # ResNet-34 has the same widths
    method = new_method(make_task((3, 8, 8), teacher=teacher), contrast_width=256)
    x = torch.randn(2, 3, 8, 8)
    with spatial_means(method.layers) as means:
        stages = teacher.features(x)[2]
    stem = F.relu(teacher.bn1(teacher.conv1(x)))
    for mean, stage in zip(means, [stem, *stages[:3]], strict=True):
        torch.testing.assert_close(mean, stage.mean((2, 3)))
    assert torch.cat(means, 1).shape == (2, 512)
    assert sum(parameter.numel() for parameter in method.head.parameters()) == 393_984


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_spatial_means_and_their_gradient_are_torchs_to_the_bit(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Beside another gradient of the same activation, as in a teacher."""
    layer, weights, gradients = nn.Identity(), torch.randn(4, 3), []
    for plain in (True, False):
        x = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype, memory_format=layout)
        x.requires_grad_()
        if plain:
            mean, through = x.mean(dim=(2, 3), dtype=torch.float32), layer(x)
        else:
            with spatial_means([layer]) as means:
                through = layer(x)
            (mean,) = means
        (gradient,) = torch.autograd.grad((mean * weights).sum() + (through**2).float().sum(), x)
        gradients.append((mean.detach(), gradient))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert gradients[0][0].dtype == torch.float32


def test_features_are_raw_means_of_the_layers_inputs(task: Task) -> None:
    x = torch.randn(4, *task.image_shape)
    with spatial_means([task.teacher.bn1]) as means:
        task.teacher(x)
    torch.testing.assert_close(means[0], task.teacher.conv1(x).mean((2, 3)))


def test_a_tap_closes_itself(task: Task) -> None:
    with pytest.raises(KeyError), spatial_means(feature_layers(task.teacher)):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in task.teacher.modules())


def test_what_a_new_generator_starts_from() -> None:
    generator = Generator(256, (3, 32, 32))
    for parameter in generator.parameters():
        nn.init.constant_(parameter, 7)
    reinitialize(generator)
    for module in generator.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.mean().item() == pytest.approx(0, abs=0.002)
            assert module.weight.std().item() == pytest.approx(0.02, abs=0.001)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.35)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.bias is not None:
            assert module.bias.count_nonzero() == 0


# -- The loss -------------------------------------------------------------------------------------------------------

S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)


class Fixed(nn.Module):
    """Gives the same logits whatever it sees; one BatchNorm layer, to be tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        self.norm(images)
        return T


@pytest.mark.parametrize(("weight", "value"), [(0.8, 9.193073271766902), (0.0, 9.193073271766902 - 0.8 * WITH_BANK)])
def test_total_loss(
    make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch, weight: float, value: float
) -> None:
    """Statistics + cross entropy + 0.5 * masked adversarial term + 0.8 * contrast."""
    method = new_method(make_task(classes=3, teacher=Fixed().eval()), contrast=weight)
    method.matcher.loss = lambda: torch.tensor(0.3993632302158505, dtype=torch.float64)  # type: ignore[method-assign]
    monkeypatch.setattr(Cmi, "_contrast", lambda *_: torch.tensor(WITH_BANK, dtype=torch.float64))
    loss, _ = method._loss(torch.rand(4, 1, 8, 8), torch.tensor([2, 0, 0, 1]), lambda view: S)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(value, rel=1e-9)


def contrasting(task: Task) -> Cmi:
    """A method whose head does nothing, with room for the golden features."""
    method = new_method(task, contrast_temperature=0.2)
    method.head = nn.Identity()  # type: ignore[assignment]
    method.bank = Bank(30, 10)
    return method


def test_contrast_without_a_bank(task: Task) -> None:
    assert contrasting(task)._contrast(LOCAL.float(), GLOBAL.float()).item() == pytest.approx(ALONE, rel=1e-5)


def test_contrast_with_a_bank(task: Task) -> None:
    method = contrasting(task)
    method.bank.add(torch.cat([CACHED_LOCAL, CACHED_GLOBAL], 1))
    local, whole = LOCAL.float().requires_grad_(), GLOBAL.float().requires_grad_()
    loss = method._contrast(local, whole)
    assert loss.item() == pytest.approx(WITH_BANK, rel=1e-5)
    loss.backward()
    assert local.grad is not None
    assert local.grad[0].tolist() == pytest.approx(GRADIENT, rel=1e-4)
    assert whole.grad is None


def test_the_head_learns_from_the_queries_alone(task: Task) -> None:
    method = new_method(task)
    width = method.head[0].in_features
    local, whole = torch.randn(3, width), torch.randn(3, width)
    method._contrast(local, whole).backward()
    got = [parameter.grad.clone() for parameter in method.head.parameters() if parameter.grad is not None]
    method.head.zero_grad()
    keys = method.head(whole).detach()
    contrastive(method.head(local), keys, 0.1, fresh=3).backward()
    for gradient, parameter in zip(got, method.head.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_no_more_than_the_asked_negatives_are_drawn(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    method, rows = new_method(task, negatives=16), []
    monkeypatch.setattr(cmi, "contrastive", lambda q, k, t, fresh: rows.append((len(q), len(k), fresh)) or q.sum())
    width = method.head[0].in_features
    for filled in (0, 10, 20):
        method.bank = Bank(30, 2 * width)
        method.bank.add(torch.randn(filled, 2 * width))
        method._contrast(torch.randn(4, width), torch.randn(4, width))
    assert rows == [(4, 4, 4), (14, 14, 4), (20, 20, 4)]


@pytest.mark.parametrize("detached", [False, True])
def test_the_contrast_reaches_the_images_through_the_local_view_only(
    task: Task, student: nn.Module, monkeypatch: pytest.MonkeyPatch, detached: bool
) -> None:
    if detached:
        crop = cmi.random_resized_crop_flip
        monkeypatch.setattr(cmi, "random_resized_crop_flip", lambda images, *rest: crop(images.detach(), *rest))
    method = new_method(task, adversarial=0, batchnorm=0, onehot=0)
    images = torch.rand(6, *task.image_shape, requires_grad=True)
    loss, _ = method._loss(images, torch.zeros(6, dtype=torch.int64), student)
    (gradient,) = torch.autograd.grad(loss, images)
    assert bool(gradient.any()) is not detached


class Views:
    """What teacher and student were shown."""

    def __init__(self, task: Task, student: nn.Module) -> None:
        self.teacher: list[Tensor] = []
        self.student: list[Tensor] = []
        for model, seen in ((task.teacher, self.teacher), (student, self.student)):
            model.register_forward_pre_hook(lambda _model, inputs, to=seen: to.append(inputs[0].detach().clone()))


def test_statistics_and_student_belong_to_the_global_view(task: Task, student: nn.Module) -> None:
    method, images = new_method(task), torch.rand(6, *task.image_shape)
    views = Views(task, student)
    method._loss(images, torch.zeros(6, dtype=torch.int64), student)
    kept = method.matcher.loss()
    whole, local = views.teacher
    assert torch.equal(views.student[0], whole)
    assert not torch.equal(whole, local)
    matcher = BatchNormMatcher(task.teacher)
    with matcher.watching():
        task.teacher(whole)
    torch.testing.assert_close(kept, matcher.loss())


def test_the_pairs_are_the_features_of_both_views(task: Task, student: nn.Module) -> None:
    method, images = new_method(task), torch.rand(6, *task.image_shape, requires_grad=True)
    views = Views(task, student)
    _, pairs = method._loss(images, torch.zeros(6, dtype=torch.int64), student)
    features = []
    for view in (views.teacher[1], views.teacher[0]):
        with spatial_means(method.layers) as means:
            task.teacher(view)
        features += means
    torch.testing.assert_close(pairs, torch.cat(features, 1))
    assert not pairs.requires_grad


@pytest.mark.parametrize("keeps", [True, False])
def test_flips_obey_the_data_set(
    make_task: Callable[..., Task], student: nn.Module, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    asked: list[tuple[Any, ...]] = []
    for name in ("random_crop_flip", "random_resized_crop_flip"):
        monkeypatch.setattr(cmi, name, lambda images, *rest: asked.append(rest) or images)
    task = make_task(flip_keeps_class=keeps)
    new_method(task)._loss(torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64), student)
    assert asked == [(1, keeps, task.rng), (keeps, task.rng)]


# -- One call -------------------------------------------------------------------------------------------------------


class Script:
    """A loss with given values whose gradient moves the generator; step s gives pairs full of s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
        self.outputs: list[Tensor] = []
        self.labels = torch.empty(0)
        self._values = values
        monkeypatch.setattr(Cmi, "_loss", lambda method, *rest: self._loss(method, *rest))

    def _loss(self, method: Cmi, images: Tensor, labels: Tensor, _student: nn.Module) -> tuple[Tensor, Tensor]:
        step = len(self.outputs) % len(self._values)
        self.labels = labels
        self.outputs.append(images.detach().clone())
        moving = images.square().sum()
        return self._values[step] + (moving - moving.detach()), torch.full(
            (len(images), method.bank._rows.shape[1]), step
        )


@pytest.mark.parametrize(
    ("values", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2), ([2.0, 1.0, 1.0], 1)]
)
def test_images_and_features_of_the_lowest_loss_are_kept(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, values: list[float], best: int
) -> None:
    """From before that step's update, bit by bit what the generator gave."""
    script, method = Script(monkeypatch, values), new_method(task)
    made = method.synthesize(student, at(0))
    assert made.images is not None
    assert [torch.equal(made.images, output) for output in script.outputs] == [step == best for step in range(STEPS)]
    assert made.scalars["synthesis_loss"].item() == min(values)
    assert len(method.bank) == B
    assert method.bank.draw(B).unique().tolist() == [best]


def test_a_call_makes_one_batch_and_fills_the_bank(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    for call in range(5):
        made = method.synthesize(student, at(call))
        assert made.images is not None
        assert made.images.shape == (B, *task.image_shape)
        assert 0 <= made.images.min() < made.images.max() <= 1
        assert not made.images.requires_grad
        assert len(method.bank) == min(30, B * (call + 1))


def test_a_bank_that_is_full_to_the_brim_gives_negatives(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code draws none at that one call, and its loss is NaN."""
    rows: list[int] = []
    loss = contrastive

    def watched(queries: Tensor, keys: Tensor, temperature: float, fresh: int) -> Tensor:
        rows.append(len(queries))
        return loss(queries, keys, temperature, fresh)

    monkeypatch.setattr(cmi, "contrastive", watched)
    method = new_method(task, bank_size=2 * B, generator_steps=1)
    losses = [method.synthesize(student, at(call)).scalars["synthesis_loss"] for call in range(5)]
    assert torch.stack(losses).isfinite().all()
    assert rows == [B, 2 * B, B + 16, B + 16, B + 16]


def test_the_generator_is_new_in_every_call_and_the_head_lives_on(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[Tensor]] = []

    def watched(generator: nn.Module) -> None:
        reinitialize(generator)
        started.append([parameter.detach().clone() for parameter in generator.parameters()])

    monkeypatch.setattr(cmi, "reinitialize", watched)
    method = new_method(task)
    head = method.head[0].weight.detach().clone()
    for call in range(2):
        method.synthesize(student, at(call))
        assert not torch.equal(method.head[0].weight, head)
        head = method.head[0].weight.detach().clone()
    assert not torch.equal(started[0][-2], started[1][-2])
    assert int(method.head_optimizer.state[method.head[0].weight]["step"]) == 2 * STEPS


def test_optimisers(task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rate for generator, latent vectors and head; the head has Adam's own betas."""
    made: list[tuple[int, Any]] = []
    adam = torch.optim.Adam

    def watched(parameters: Any, **settings: Any) -> torch.optim.Adam:
        optimizer = adam(parameters, **settings)
        group = optimizer.param_groups[0]
        made.append((len(group["params"]), (group["lr"], group["betas"])))
        return optimizer

    monkeypatch.setattr(torch.optim, "Adam", watched)
    new_method(task, generator_lr=5e-3).synthesize(student, at(0))
    generator = len(list(Generator(8, task.image_shape, 4).parameters()))
    assert made == [(4, (5e-3, (0.9, 0.999))), (generator + 1, (5e-3, (0.5, 0.999)))]


def test_labels_are_sorted_and_random_over_all_classes(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, [0.0])
    new_method(task, synthesis_batch_size=1000, generator_steps=1).synthesize(student, at(0))
    counts = script.labels.bincount(minlength=5)
    assert torch.equal(script.labels, script.labels.sort().values)
    assert (len(counts), int(counts.sum())) == (5, 1000)
    assert counts.sub(200).abs().max() < 65  # five standard deviations


def test_the_student_competes_from_the_first_epoch_in_eval_mode(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes = new_method(task), record_modes(student)
    method.synthesize(student, at(0, warmup=5))
    assert modes == [False] * STEPS


def test_without_the_adversarial_term_the_student_is_never_called(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes = new_method(task, adversarial=0), record_modes(student)
    method.synthesize(student, at(9))
    assert modes == []


@pytest.mark.parametrize(("weight", "passes", "filled"), [(0.8, 2 * STEPS, B), (0.0, STEPS, 0)])
def test_without_contrast_there_is_no_second_view(
    task: Task, student: nn.Module, at: At, weight: float, passes: int, filled: int
) -> None:
    method = new_method(task, contrast=weight)
    views = Views(task, student)
    method.synthesize(student, at(0))
    assert (len(views.teacher), len(method.bank)) == (passes, filled)


def test_teacher_and_student_stay_as_they_are(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    models = (task.teacher, student)
    before = [snapshot(model) for model in models]
    new_method(task).synthesize(student, at(0))
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_contrast_is_learned(task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a call the loss falls: views of one image are told from those of the others better and better."""
    values: list[float] = []
    contrast = Cmi._contrast

    def watched(self: Cmi, local: Tensor, whole: Tensor) -> Tensor:
        value = contrast(self, local, whole)
        values.append(value.item())
        return value

    monkeypatch.setattr(Cmi, "_contrast", watched)
    weights = {"adversarial": 0, "batchnorm": 0, "onehot": 0, "contrast": 1}
    new_method(task, synthesis_batch_size=30, generator_steps=60, generator_lr=0.01, **weights).synthesize(
        student, at(0)
    )
    assert sum(values[-10:]) / 10 < sum(values[:5]) / 5 - 0.5


def test_a_resumed_method_makes_the_same_images(
    make_task: Callable[..., Task], student: nn.Module, at: At, tmp_path: Path
) -> None:
    task = make_task()
    method = new_method(task)
    for epoch in range(3):  # the bank has wrapped around
        method.synthesize(student, at(epoch))
    streams = {"rng": task.rng.get_state(), "torch": torch.get_rng_state()}
    save_tree(tmp_path / "state", {"method": method.state_dict(), **streams})
    expected = [method.synthesize(student, at(epoch)).images for epoch in (3, 4)]

    saved = load_tree(tmp_path / "state")
    other_task = make_task()
    other = new_method(other_task)
    other.load_state_dict(saved["method"])
    other_task.rng.set_state(saved["rng"])
    torch.set_rng_state(saved["torch"])
    got = [other.synthesize(student, at(epoch)).images for epoch in (3, 4)]
    for one, same in zip(got, expected, strict=True):
        assert one is not None
        assert same is not None
        assert torch.equal(one, same)


# -- Settings -------------------------------------------------------------------------------------------------------

# key: images a student step, images a call
SCRIPTS = {
    "cifar10/wrn40_2:wrn16_1": (128, 256),
    "cifar10/wrn40_2:wrn16_2": (256, 512),
    "cifar10/wrn40_2:wrn40_1": (256, 512),
    "cifar10/resnet34:resnet18": (256, 512),
    "cifar10/vgg11:resnet18": (256, 512),
}


@pytest.mark.parametrize("key", SCRIPTS)
def test_published_settings(key: str) -> None:
    published = Cmi.published[key]
    schedule, config = published.schedule, CmiConfig(**published.config)
    assert (schedule.batch_size, config.synthesis_batch_size) == SCRIPTS[key]
    assert (config.generator_steps, config.generator_lr, config.latent_dim, config.temperature) == (200, 1e-3, 256, 20)
    assert (config.adversarial, config.batchnorm, config.onehot, config.contrast) == (0.5, 1, 1, 0.8)
    assert (config.contrast_temperature, config.bank_size) == (0.1, 40_960)
    assert (config.negatives, config.contrast_width, config.generator_width) == (4096, 256, 64)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.rounds_per_epoch) == (200, 0, 1)
    assert (schedule.student_steps, schedule.lr, schedule.lr_rule, schedule.lr_min) == (400, 0.1, "cosine", 0)
    assert (schedule.optimizer, schedule.momentum, schedule.weight_decay) == ("sgd", 0.9, 1e-4)


def test_nothing_else_is_published() -> None:
    assert set(Cmi.published) == set(SCRIPTS)
    assert [key for key, entry in Cmi.published.items() if entry.origin == "code"] == ["cifar10/wrn40_2:wrn16_1"]


# -- Initial images -------------------------------------------------------------------------------------------------


def as_stored(images: Tensor | None) -> Tensor:
    """As the pool would keep them."""
    assert images is not None
    return augment.to_uint8(images)


def initial(count: int = 7) -> Tensor:
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_the_first_call_hands_over_the_initial_images(
    make_task: Callable[..., Task], student: nn.Module, at: At
) -> None:
    method = new_method(make_task(initial_images=initial()))
    made = [as_stored(method.synthesize(student, at(epoch)).images) for epoch in range(3)]
    assert [len(images) for images in made] == [7 + B, B, B]
    assert torch.equal(made[0][:7], initial())


def test_they_are_handed_over_once_where_an_epoch_has_several_rounds(
    make_task: Callable[..., Task], student: nn.Module, at: At
) -> None:
    method = new_method(make_task(initial_images=initial()))
    sizes = [len(as_stored(method.synthesize(student, at(0, round_=number)).images)) for number in range(2)]
    assert sizes == [7 + B, B]


def test_they_change_nothing_of_what_is_made(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    """They are in the pool alone: neither in the bank nor anywhere else in the inversion."""
    made = []
    for images in (None, initial()):
        method = new_method(make_task(initial_images=images))
        made.append([as_stored(method.synthesize(student, at(epoch)).images)[-B:] for epoch in range(2)])
        assert len(method.bank) == 2 * B
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def job_with(folder: Path) -> Job:
    tiny = TINY | {"epochs": 2, "student_steps": 2, "batch_size": 16, "initial_images": str(folder)}
    settings = {"teacher.epochs": 1} | {f"cmi.{name}": value for name, value in tiny.items()}
    suite = make_suite("t", "t", "digits", ["cmi"], "smoke", ["convnet8:convnet8"], (), settings=settings)
    (job,) = expand(suite, plugins.discover(), data.dataset("digits"), "cpu", "fp32")
    return job


def test_a_run_begins_with_the_images_of_the_named_folder(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    for number, image in enumerate(initial()):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    job = job_with(folder)
    teachers.train(data.dataset("digits"), job.teacher, Compute(torch.device("cpu")))
    record = run(job, Place(tmp_path / "out", device="cpu"))
    assert (record.status, record.counters.images_made) == ("done", 7 + 2 * B)
    assert record.knowledge == "images made beforehand"
    with pytest.raises(UserError, match="there is no folder"):
        run(job_with(tmp_path / "nowhere"), Place(tmp_path / "out", device="cpu"))
