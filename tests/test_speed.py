"""The measuring tool: the plain form computes what the method computes, figures are right, wrong input is one line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from dfkd_bench import plugins, statistics
from dfkd_bench.benchmarks import speed as command
from dfkd_bench.errors import UserError
from dfkd_bench.method import Batch, Method, Progress, Schedule, Task
from dfkd_bench.optimise import build_optimizer
from dfkd_bench.pool import Pool
from dfkd_bench.speed import (
    bench,
    figure,
    forms,
    measure,
    order,
    ordinary,
    peak,
    plain,
    profiling,
    released_manner,
    report,
    timing,
    turns,
    values,
)
from dfkd_bench.speed.values import Machine, Peak

CPU = torch.device("cpu")
NEW_PROCESS = turns.new_process
FOUND = plugins.discover()
SCHEDULE = Schedule(epochs=10, student_steps=2, batch_size=8, lr=0.05)
SETTINGS = {"encoder": "random:16", "synthesis_batch_size": 12, "generator_steps": 3, "loops": 1}
SETTINGS |= {"noisy_width": 8, "generator_width": 4, "generator_life": None}
AT = Progress(epoch=1, round=0, epochs=10, warmup_epochs=0)

# --- The plain form ---------------------------------------------------------------------------------------------------


@pytest.fixture
def still_task(make_task: Callable[..., Task]) -> Task:
    """Nothing in it is cropped or flipped: the two forms would draw other numbers. 12 images are whole blocks of 4."""
    return make_task(classes=4, crop_padding=0, flip_keeps_class=False)


@pytest.fixture
def both_forms(still_task: Task, make_student: Callable[..., nn.Module]) -> tuple[Method, plain.Plain, nn.Module]:
    """The method, the plain form with the same weights, and the method's student, which starts as the plain form's."""
    torch.manual_seed(0)
    method_class = FOUND.method(plain.METHOD)
    method: Any = method_class(method_class.Config(**SETTINGS), still_task)
    method.generator.noisy.reinitialize = lambda: None  # noisy layers are drawn here, once for both
    student = make_student(classes=4)
    form = plain.Plain(method.config, SCHEDULE, still_task, copy.deepcopy(still_task.teacher), copy.deepcopy(student))
    copy_weights(method.generator, form.generator)
    return method, form, student


def copy_weights(source: Any, target: plain.PlainGenerator) -> None:
    with torch.no_grad():
        for layer, weight, bias in zip(target.noisy, source.noisy.weight, source.noisy.bias, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        target.norm.load_state_dict(source.norm.state_dict())
        target.project.load_state_dict(source.project.state_dict())
        for mine, its in zip(target.body.parameters(), source.body.parameters(), strict=True):
            mine.copy_(its)


def test_generator_steps_have_the_methods_loss_and_images(both_forms: Any) -> None:
    """Three Adam steps a call; the second call has remembered statistics, too."""
    method, form, student = both_forms
    for _ in range(2):
        made = method.synthesize(student, AT)
        images, loss = form.synthesize(plain.keep_on_device, reinitialize=False)
        torch.testing.assert_close(loss, made.scalars["synthesis_loss"], rtol=1e-4, atol=0)
        torch.testing.assert_close(images, made.images, rtol=0, atol=2e-3)


def test_the_generators_gradient_is_the_methods(both_forms: Any, still_task: Task) -> None:
    method, form, student = both_forms
    gradients: list[list[Tensor]] = []
    for generator, step in (
        (method.generator, lambda: method.synthesize(student, AT)),
        (form.generator, lambda: form.synthesize(plain.keep_on_device, reinitialize=False)),
    ):
        step()
        gradients.append([value.grad.clone() for value in generator.body.parameters()])
    for its, mine in zip(*gradients, strict=True):
        cosine = torch.cosine_similarity(its.flatten(), mine.flatten(), dim=0)
        assert cosine > 0.999


def test_student_steps_have_the_methods_loss(both_forms: Any) -> None:
    method, form, student = both_forms
    optimizer = build_optimizer(student.requires_grad_(True).parameters(), SCHEDULE)
    student.train()
    form.student.train().requires_grad_(True)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        loss = method.student_loss(student, Batch(images), AT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # At T = 20 the loss is a small difference of logarithms near each other: four of fp32's seven digits are left.
        torch.testing.assert_close(form.student_step(images), loss.detach(), rtol=1e-3, atol=0)


def test_no_hook_is_left_on_the_teacher_for_the_student_step(both_forms: Any) -> None:
    _, form, _ = both_forms
    form.synthesize(plain.keep_on_device)
    assert [module for module in form.teacher.modules() if module._forward_hooks] == []


def test_every_noisy_layer_is_drawn_anew(both_forms: Any) -> None:
    _, form, _ = both_forms
    before = [layer.weight.clone() for layer in form.generator.noisy]
    form.generator.reinitialize()
    assert not any(torch.equal(old, layer.weight) for old, layer in zip(before, form.generator.noisy, strict=True))


def test_large_images_have_the_methods_other_ladder(make_task: Callable[..., Task]) -> None:
    task = make_task((1, 128, 128))
    method_class = FOUND.method(plain.METHOD)
    method: Any = method_class(method_class.Config(**SETTINGS), task)
    mine = plain.PlainGenerator((1, 128, 128), 5, 16, 12, 8, 4)
    shapes = [tuple(value.shape) for value in mine.body.parameters()]
    assert shapes == [tuple(value.shape) for value in method.generator.body.parameters()]


def test_crops_and_flips_are_of_the_padded_image() -> None:
    torch.manual_seed(0)
    image = torch.arange(1.0, 10).view(1, 1, 3, 3)
    padded = torch.nn.functional.pad(image, [1] * 4)
    crops = [padded[0, :, top : top + 3, left : left + 3] for top in range(3) for left in range(3)]
    possible = {tuple(way.flatten().tolist()) for crop in crops for way in (crop, crop.flip(2))}
    seen = {tuple(one.flatten().tolist()) for one in plain.crop_flip(image.expand(500, 1, 3, 3), 1, True)}
    assert seen == possible


def one_by_one(images: Tensor, padding: int, flip: bool) -> Tensor:
    """What ``crop_flip`` does, in words: the same draws, one image after the other."""
    height, width = images.shape[2:]
    places = torch.randint(0, 2 * padding + 1, (2, images.shape[0])).tolist()
    flips = (torch.rand(images.shape[0]) < 0.5).tolist()
    cut = []
    for image, top, left, mirror in zip(
        torch.nn.functional.pad(images, [padding] * 4).unbind(), *places, flips, strict=True
    ):
        part = image[:, top : top + height, left : left + width]
        cut.append(part.flip(2) if flip and mirror else part)
    return torch.stack(cut)


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True)])
def test_a_batch_is_cropped_at_once_as_image_by_image(padding: int, flip: bool) -> None:
    weights, made = torch.rand(9, 3, 6, 5), []
    for crop in (one_by_one, plain.crop_flip):
        images = torch.rand(9, 3, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(1)
        cut = crop(images, padding, flip)
        (gradient,) = torch.autograd.grad((cut * weights).sum(), images)
        made.append((cut, gradient, torch.get_rng_state()))
    assert all(torch.equal(first, second) for first, second in zip(*made, strict=True))


# --- The released manner ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [(3.0, 1.0, 2.0), (1.0, 2.0, 3.0), (3.0, 2.0, 1.0)])
def test_host_and_device_keep_the_same_images(losses: tuple[float, ...]) -> None:
    host = device = None
    for loss in losses:
        images = torch.full((2, 1, 2, 2), loss)
        host = released_manner.keep_on_host(images, torch.tensor(loss), host)
        device = plain.keep_on_device(images, torch.tensor(loss), device)
    assert host is not None
    assert device is not None
    assert torch.equal(host[0], device[0])
    assert host[1] == device[1].item() == 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_the_written_images_truncated_and_normalised(
    channels: int, make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released_manner, "WORKERS", 0)
    task = make_task((channels, 8, 8), crop_padding=0, flip_keeps_class=False)
    value = 200.9 / 255  # 8 bits keep 200 of it
    released_manner.write(torch.full((6, channels, 8, 8), value), tmp_path)
    batch = next(released_manner.loader(tmp_path, released_manner.training_transform(task), 4))
    torch.testing.assert_close(batch, torch.full((4, channels, 8, 8), (200 / 255 - 0.5) / 0.25))


# --- Figures ----------------------------------------------------------------------------------------------------------

MACHINE = Machine(
    peaks={
        "fp32": Peak(matrix_product=1e9, convolution=2e9),
        "bf16": Peak(matrix_product=8e9, convolution=4e9),
    },
    copy_bytes_per_second=1e9,
)
WORK = timing.Work(flop=4 * 10**8, moved=10**7)


def test_work_of_a_matrix_product() -> None:
    left, right = torch.zeros(5, 7), torch.zeros(7, 3)
    assert timing.work_of(lambda: left @ right) == timing.Work(2 * 5 * 7 * 3, 5 * 7 + 7 * 3 + 5 * 3)


def test_work_of_a_convolution_and_its_backward() -> None:
    images, layer = torch.zeros(2, 3, 8, 8, requires_grad=True), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    forward = 2 * 2 * 4 * 64 * 3 * 9
    assert timing.work_of(lambda: layer(images).sum().backward()).flop == 3 * forward


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_work_of_a_grouped_convolution_is_three_times_its_forward(kind: Any, groups: int) -> None:
    images, layer = torch.zeros(2, 4, 8, 8, requires_grad=True), kind(4, 8, 3, padding=1, groups=groups, bias=False)
    forward = timing.work_of(lambda: layer(images)).flop
    assert forward == 2 * 2 * 8 * 64 * 4 // groups * 9
    assert timing.work_of(lambda: layer(images).sum().backward()).flop == 3 * forward


def test_share_is_of_the_best_at_the_same_precision() -> None:
    shares = [values.cell((0.25,), 8, WORK, precision, MACHINE).share_of_peak for precision in ("fp32", "bf16")]
    assert shares == [pytest.approx(0.8), pytest.approx(0.2)]


def test_ordinary_code_is_measured_by_the_peak_it_has_on_a_gpu() -> None:
    """PyTorch rounds the operands of fp32 convolutions there; ours in fp32 does not."""
    peaks = {**MACHINE.peaks, "tf32": Peak(matrix_product=1e9, convolution=16e9)}
    gpu = Machine(peaks=peaks, copy_bytes_per_second=1e12)  # type: ignore[arg-type]
    ours, plain = (values.cell((0.25,), 8, WORK, "fp32", gpu, ordinary) for ordinary in (False, True))
    assert (ours.share_of_peak, plain.share_of_peak) == (pytest.approx(0.8), pytest.approx(0.1))


def test_bound_is_the_larger_one() -> None:
    """Arithmetic takes 0.2 s in fp32 and 0.05 s in bf16; a hundred million numbers take 0.4 s and 0.2 s."""
    much = timing.Work(WORK.flop, 10**8)
    shares = [
        values.cell((1.0,), 8, work, p, MACHINE).share_of_bound for work in (WORK, much) for p in ("fp32", "bf16")
    ]
    assert shares == [pytest.approx(value) for value in (0.2, 0.05, 0.4, 0.2)]


def test_the_better_of_two_measurements_of_the_machine_counts() -> None:
    slow = Machine(peaks={"fp32": Peak(matrix_product=5e8, convolution=3e9)}, copy_bytes_per_second=2e9)
    fast = Machine(peaks={"fp32": MACHINE.peaks["fp32"]}, copy_bytes_per_second=1e9)
    best = Machine(peaks={"fp32": Peak(matrix_product=1e9, convolution=3e9)}, copy_bytes_per_second=2e9)
    assert peak.best_of(slow, fast) == peak.best_of(fast, slow) == best


def test_median_counts_and_images_go_by_it() -> None:
    cell = values.cell((0.5, 0.1, 90.0), 8, WORK, "fp32", MACHINE)
    assert (cell.seconds, cell.images_per_second, cell.flop_per_second) == (0.5, 16, 8e8)


def test_a_ratio_is_taken_within_each_round() -> None:
    """The machine slows down four times here, and no ratio with it."""

    def cell(*seconds: float) -> values.Cell:
        return values.cell(seconds, 8, WORK, "fp32", MACHINE)

    row = values.row("step", 8, WORK, cell(0.1, 0.2, 0.4), plain=cell(0.3, 0.5, 0.8))
    assert row.faster_than_plain == pytest.approx(2.5)  # of 3, 2.5 and 2
    assert row.faster_than_released is None


def test_warm_up_is_not_timed() -> None:
    calls: list[int] = []
    assert len(timing.repeated(lambda: calls.append(1), CPU, 4)) == 4
    assert len(calls) == 5


def test_profile_is_of_one_step_and_its_shares_add_up(capfd: pytest.CaptureFixture[str]) -> None:
    left = torch.randn(64, 64)
    found = profiling.operators(lambda: [left @ left for _ in range(6)], CPU, 3, top=1000)
    assert {one.name: one.calls for one in found}["aten::mm"] == 2
    assert math.fsum(one.share for one in found) == pytest.approx(1)
    assert capfd.readouterr().err == ""


def test_a_range_on_a_gpu_is_not_counted_beside_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(key: str, microseconds: float, annotation: bool = False) -> Any:
        facts = {"device_type": torch.autograd.DeviceType.CUDA, "count": 2, "is_user_annotation": annotation}
        return types.SimpleNamespace(key=key, self_device_time_total=microseconds, **facts)

    events = [event("conv", 30.0), event("Optimizer.step#SGD.step", 10.0, True), event("multi_tensor_apply", 10.0)]
    profiled = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profiling, "profile", lambda activities: contextlib.nullcontext(profiled))
    monkeypatch.setattr(profiling, "synchronize", lambda device: None)
    found = profiling.operators(lambda: None, torch.device("cuda", 0), 2)
    assert [(one.name, one.share) for one in found] == [("conv", 0.75), ("multi_tensor_apply", 0.25)]


# --- Whole measurements -----------------------------------------------------------------------------------------------

TINY = {"pair": "convnet8:convnet8", "batch": 4, "synthesis_batch": 4, "side": 8, "classes": 4, "channels": 1}
TINY |= {"steps": 2, "repeat": 1}


@pytest.fixture(scope="module")
def small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peak.SIDES, "cpu", 64)
        patch.setitem(peak.CONVOLUTIONS, "cpu", (2, 8, 8))
        patch.setitem(peak.COPIED, "cpu", 2**16)
        patch.setitem(bench.EVALUATED, "cpu", 20)
        patch.setattr(released_manner, "WORKERS", 0)
        patch.setattr(released_manner, "SETTLING", 0.0)
        patch.setattr(turns, "new_process", lambda: ThreadPoolExecutor(1))  # where all of this is patched, too
        yield


@pytest.fixture(scope="module")
def measured(small_machine: None) -> values.Speed:
    return measure.measure(measure.Question(plain.METHOD, **TINY), FOUND, "cpu", "bf16")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def other(small_machine: None) -> values.Speed:
    return measure.measure(measure.Question("fm", **TINY), FOUND, "cpu", "fp32")  # type: ignore[arg-type]


def text_of(speed: values.Speed) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=140).print(report.render(speed))
    return file.getvalue().splitlines()


def test_every_step_is_there_in_all_its_forms(measured: values.Speed) -> None:
    there = {row.name: (bool(row.exact), bool(row.plain), bool(row.released)) for row in measured.rows}
    assert there == {
        "generator step": (True, True, True),
        "student step": (True, True, False),
        "student step with batch": (True, False, True),
        "teacher's answers": (True, True, False),
        "evaluation": (True, True, False),
    }


def test_only_ours_has_the_asked_precision(measured: values.Speed) -> None:
    first = measured.rows[0]
    assert first.plain is not None
    assert first.exact is not None
    assert (first.ours.precision, first.exact.precision, first.plain.precision) == ("bf16", "fp32", "fp32")


def test_fp32_has_no_fp32_beside_it(other: values.Speed) -> None:
    _, line = [line for line in text_of(other) if line.startswith("generator step  ")]
    assert line.split()[2:5] == ["-"] * 3


def test_another_method_has_itself_as_ordinary_code_beside_it(other: values.Speed) -> None:
    there = {row.name: (bool(row.plain), bool(row.released)) for row in other.rows}
    assert there == {
        "generator step": (True, True),
        "student step": (True, False),
        "student step with batch": (True, True),
        "teacher's answers": (True, False),
        "evaluation": (True, False),
    }
    assert other.png_seconds is not None


def test_every_method_in_bf16_has_itself_in_fp32_beside_it(small_machine: None) -> None:
    speed = measure.measure(measure.Question("dafl", **TINY), FOUND, "cpu", "bf16")  # type: ignore[arg-type]
    assert [row.name for row in speed.rows if row.exact] == [row.name for row in speed.rows]
    assert speed.png_seconds is None  # it keeps no pool
    exact = measure.measure(measure.Question("dafl", **TINY), FOUND, "cpu", "fp32")  # type: ignore[arg-type]
    assert [row.flop for row in speed.rows] == [row.flop for row in exact.rows]  # bf16's kernels tell no counter
    assert all(row.flop > 0 for row in speed.rows)


@pytest.mark.parametrize("step", [forms.GENERATOR, forms.STUDENT])
def test_work_is_of_one_step_however_many_a_call_has(step: str, small_machine: None) -> None:
    works = []
    for steps in (1, 3):
        with bench.temporary_home():
            asked = measure.Question("fm", **(TINY | {"steps": steps}))  # type: ignore[arg-type]
            works.append(forms.Ours(asked, CPU, "fp32", 1, FOUND).works()[step])
    assert works[0] == works[1]
    assert works[0].flop > 0


def test_generating_a_batch_is_no_part_of_the_student_step(small_machine: None) -> None:
    """dafl keeps no pool: its generator makes each student batch when it is asked for."""
    with bench.temporary_home():
        asked = measure.Question("dafl", **TINY)  # type: ignore[arg-type]
        ours = forms.Ours(asked, CPU, "fp32", 1, FOUND)
        works = ours.works()
        made = timing.work_of(ours.bench.sampling)
    assert made.flop > 0
    assert works[forms.LOADED].flop == works[forms.STUDENT].flop + made.flop


def test_an_evaluation_of_large_images_has_fewer_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.EVALUATED, "cpu", 1000)
    counts = [bench.evaluated(replace(measure.Question("fm"), side=side), CPU) for side in (8, 32, 64, 224)]
    assert counts == [1000, 1000, 250, 20]


def test_phases_of_an_epoch(measured: values.Speed) -> None:
    assert list(measured.epoch) == ["synthesis", "sampling", "distillation", "evaluation", "other", "checkpoint"]
    assert all(seconds >= 0 for seconds in measured.epoch.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system can't begin a new peak of memory")
def test_peak_memory_is_of_each_form(measured: values.Speed) -> None:
    assert list(measured.peak_memory) == ["ours", "fp32", "plain", "released"]
    assert all(size > 2**24 for size in measured.peak_memory.values())


# --- Any method as ordinary code --------------------------------------------------------------------------------------


def small_bench(method: str) -> bench.Bench:
    torch.manual_seed(0)
    with bench.temporary_home():
        return bench.Bench(measure.Question(method, **TINY), CPU, "fp32", 1, FOUND)  # type: ignore[arg-type]


def layouts(model: nn.Module) -> set[bool]:
    """Whether a weight of a convolution with several inputs and a window lies channels-last."""
    kernels = [value for value in model.parameters() if value.dim() == 4 and min(value.shape[1:]) > 1]
    return {value.is_contiguous(memory_format=torch.channels_last) for value in kernels}


def test_ordinary_code_has_rows_and_leaves_nothing_behind(small_machine: None) -> None:
    with ordinary.ordinary():
        inside = small_bench("fm")
    outside = small_bench("fm")
    for built, channels_last in ((inside, False), (outside, True)):
        networks = (built.task.teacher, built.method.generator, built._bench.student)  # type: ignore[attr-defined]
        assert [layouts(network) for network in networks] == [{channels_last}] * 3
    assert "contiguous" not in vars(Tensor)


def test_ordinary_code_computes_what_the_method_does(small_machine: None) -> None:
    """The same weights and images: an epoch moves both students to the same place, rounding apart."""
    ends = []
    for around in (contextlib.nullcontext, ordinary.ordinary):
        with around():
            built = small_bench("fm")
            torch.manual_seed(1)
            built.synthesis()
            built.distillation()
            ends.append(torch.cat([value.detach().flatten() for value in built._bench.student.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_moments_of_ordinary_code_are_the_projects() -> None:
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ordinary.moments(x), statistics.batch_moments(x))


def test_ordinary_optimisers_are_torchs_default_ones() -> None:
    for make in (torch.optim.Adam, torch.optim.SGD):
        with ordinary.ordinary():
            inside = make([nn.Parameter(torch.zeros(2))], lr=0.1, fused=True)
        outside = make([nn.Parameter(torch.zeros(2))], lr=0.1, fused=True)
        assert (inside.defaults["fused"], outside.defaults["fused"]) == (None, True)


def test_the_host_waits_after_each_optimisers_step(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(ordinary, "synchronize", waited.append)
    value = nn.Parameter(torch.zeros(2))
    value.grad = torch.ones(2)
    optimizer = torch.optim.SGD([value], lr=0.1)
    with ordinary.waiting(CPU):
        optimizer.step()
        optimizer.step()
    optimizer.step()
    assert waited == [CPU, CPU]


def test_images_of_the_pool_go_through_files(small_machine: None, tmp_path: Path) -> None:
    pool = Pool((3, 4, 4), CPU, torch.Generator())
    pool.add(torch.zeros(6, 3, 4, 4), {"kept": torch.arange(6.0)})
    released_manner.write(torch.full((6, 3, 4, 4), 200.9 / 255), tmp_path)
    before = ordinary.FilesBefore(pool, tmp_path, 4, CPU)
    images, extras = before.draw_with_extras(6)  # more than a batch of the loader
    torch.testing.assert_close(images, torch.full((6, 3, 4, 4), 200 / 255))
    assert sorted(extras["kept"].tolist()) == [0, 1, 2, 3, 4, 5]
    before.close()


@pytest.mark.parametrize("method", ["nayer", "fm"])
def test_only_the_lead_methods_yardsticks_are_written_anew(method: str, small_machine: None) -> None:
    with bench.temporary_home():
        asked = measure.Question(method, **TINY)  # type: ignore[arg-type]
        made = [order.Order(name, asked, CPU, "fp32", 1, ()).make() for name in ("plain", "released")]
        for form in made:
            form.facts()
    any_method = [isinstance(form, ordinary.OrdinaryForm) for form in made]
    assert any_method == [method != plain.METHOD] * 2


# --- Forms in turn ----------------------------------------------------------------------------------------------------


class Noted(forms.Form):
    """A form whose repeats are written down in a list that all of them share."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, CPU

    def repeat(self) -> forms.Seconds:
        self.log.append(self.name)
        return {"step": float(len(self.log))}

    def facts(self) -> forms.Facts:
        self.log.append(f"facts of {self.name}")
        return forms.Facts(None, {})


class FakeOrder:
    """An order for a form that is there."""

    def __init__(self, form: Noted, device: torch.device = CPU) -> None:
        self.name, self.device, self._form = form.name, device, form

    def make(self) -> forms.Form:
        return self._form


def turns_of(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    monkeypatch.setattr(turns, "new_process", lambda: ThreadPoolExecutor(1))
    log: list[str] = []
    orders: Any = [FakeOrder(Noted(name, log), device) for name in ("a", "b")]
    return log, list(turns.take_turns(orders, 2, lambda: log.append("-")))


def test_on_a_cpu_forms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log, found = turns_of(CPU, monkeypatch)
    assert log == ["a", "-", "b", "-", "a", "-", "b", "-", "facts of a", "facts of b"]
    assert [(name, seconds) for name, seconds, _ in found] == [
        ("a", [{"step": 1}, {"step": 5}]),
        ("b", [{"step": 3}, {"step": 7}]),
    ]


def test_on_a_gpu_one_form_follows_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together may not fit its memory."""
    log, _ = turns_of(torch.device("cuda", 0), monkeypatch)
    assert log == ["a", "-", "a", "-", "facts of a", "b", "-", "b", "-", "facts of b"]


class Slow(FakeOrder):
    """An order for a form that takes a minute to be built, and says first where."""

    def __init__(self, place: Path) -> None:
        self.name, self.device, self.place = "plain", CPU, place

    def make(self) -> forms.Form:
        self.place.write_text(str(os.getpid()))
        time.sleep(60)
        raise AssertionError("nobody waits for it")


def process_of(place: Path) -> int:
    """That of ``Slow``, once it builds."""
    end = time.monotonic() + 60
    while not (place.exists() and place.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(place.read_text())


def is_gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_the_forms_at_once(
    tmp_path: Path, tests_in_children: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "new_process", NEW_PROCESS)
    orders: Any = [Slow(tmp_path / "pid")]
    main = threading.get_ident()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # whatever other tests have left

    def interrupt() -> None:
        while not (tmp_path / "pid").exists():
            if (tmp_path / "done").exists():
                return
            time.sleep(0.05)
        for tenth in range(600):
            if (tmp_path / "done").exists():
                return
            if tenth % 50 == 0:  # again: Python drops one that comes while an object is destroyed
                signal.pthread_kill(main, signal.SIGINT)  # to the thread that waits, as a terminal's does
            time.sleep(0.1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(turns.take_turns(orders, 1, lambda: None))
    finally:
        (tmp_path / "done").touch()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    assert is_gone(process_of(tmp_path / "pid"))
    assert time.monotonic() - began < 50


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from dfkd_bench.speed import turns
from test_speed import Slow
if __name__ == "__main__":
    list(turns.take_turns([Slow(Path(sys.argv[2]))], 1, lambda: None))
"""


def test_a_form_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """It would keep its gigabytes."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    place = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), str(place)], cwd=tmp_path)
    form = process_of(place)
    parent.kill()
    parent.wait()
    assert is_gone(form)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system can't begin a new peak of memory")
def test_a_forms_memory_is_not_that_of_the_command(tests_in_children: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is started has the peak of the one that starts it, by getrusage."""
    monkeypatch.setattr(turns, "new_process", NEW_PROCESS)
    filled = bytearray(b"x") * (3 * 2**30)
    del filled
    orders: Any = [Empty()]
    ((_, _, facts),) = turns.take_turns(orders, 1, lambda: None)
    assert facts.memory is not None
    assert facts.memory < 2**31


class Empty(FakeOrder):
    """An order for a form that does nothing."""

    def __init__(self) -> None:
        self.name, self.device = "plain", CPU

    def make(self) -> forms.Form:
        form = Nothing()
        form.warm_up()
        return form


class Nothing(Noted):
    """It needs no memory."""

    def __init__(self) -> None:
        super().__init__("nothing", [])

    def facts(self) -> forms.Facts:
        return forms.Facts(self.peak(), {})


class Killed(FakeOrder):
    """An order whose process gets no further."""

    def __init__(self) -> None:
        self.name, self.device = "plain", CPU

    def make(self) -> forms.Form:
        os.kill(os.getpid(), 9)
        raise AssertionError("still there")


def test_a_form_whose_process_is_killed_is_one_line(tests_in_children: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "new_process", NEW_PROCESS)
    orders: Any = [Killed()]
    with pytest.raises(UserError, match="the process that timed 'plain' was killed, for want of memory perhaps"):
        list(turns.take_turns(orders, 1, lambda: None))


class Refused(FakeOrder):
    """An order for what can't be made."""

    def __init__(self) -> None:
        self.name, self.device = "ours", CPU

    def make(self) -> forms.Form:
        raise UserError(f"not in process {os.getpid()}")


def test_an_error_comes_back_from_another_process(tests_in_children: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "new_process", NEW_PROCESS)
    orders: Any = [Refused()]
    with pytest.raises(UserError, match=rf"not in process (?!{os.getpid()}\b)\d+"):
        list(turns.take_turns(orders, 1, lambda: None))


def test_json_comes_back_as_it_was(measured: values.Speed, tmp_path: Path) -> None:
    path, picture = report.write(measured, tmp_path)
    assert values.read(path) == measured
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_names_the_hardware(measured: values.Speed) -> None:
    kept = json.loads(measured.model_dump_json())
    assert {"device", "cpu", "cores", "threads"} <= set(kept["hardware"])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"method": 3}')
    with pytest.raises(UserError, match=r"broken\.json is no measurement"):
        values.read(path)


def test_nothing_is_left_in_the_users_home(home: Path, small_machine: None) -> None:
    with bench.temporary_home():
        bench.Bench(measure.Question("fm", **TINY), CPU, "fp32", 1, FOUND)  # type: ignore[arg-type]
    assert not home.exists()


# --- The commands -----------------------------------------------------------------------------------------------------


def ended(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["speed"])
    monkeypatch.setattr("dfkd_bench.cli.signal.signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    written = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, written.out, written.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "nayr"], "unknown method 'nayr': did you mean 'nayer'?"),
        (["--pair", "wrn40_2:wrn16_3"], "unknown model 'wrn16_3': did you mean 'wrn16_"),
        (["--pair", "wrn40_2"], "expected TEACHER:STUDENT"),
        (["--batch", "1"], "--batch 1: expected at least 2"),
        (["--synthesis-batch", "1"], "--synthesis-batch 1: expected at least 2"),
        (["--channels", "2"], "--channels 2: expected 1 or 3"),
        (["--device", "cuda"], "this machine has 0 CUDA devices"),
        (["--precision", "fp16"], "unknown precision 'fp16'"),
        (["--repeats", "3"], "No such option: --repeats"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = ended(arguments, capsys, monkeypatch)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_the_command_prints_tables_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, whose stdout is not the test's."""
    monkeypatch.setattr(turns, "new_process", NEW_PROCESS)
    options = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    code, out, err = ended([*options, "--threads", "1", "--output", str(tmp_path)], capsys, monkeypatch)
    assert code == 0
    assert re.fullmatch(r"(repeat \d/\d \(\d+ s(, about \d+ s left)?\)\n)+", err)
    assert "student step with batch" in out
    assert sorted(path.suffix for path in (tmp_path / "speed").iterdir()) == [".json", ".png"]


def test_the_figure_says_each_form_s_precision(measured: values.Speed, tmp_path: Path) -> None:
    lines = figure.draw(measured, tmp_path / "speed.svg").read_text(encoding="utf-8").splitlines()
    said = [line.strip(" <!->") for line in lines if line.strip().startswith("<!--")]
    places = [place for place, text in enumerate(said) if text in figure.LABELS.values()]
    assert [said[place + 1] for place in places] == ["bf16", "fp32", "fp32", "fp32"]


COMMITTED = sorted((Path(__file__).parents[1] / "results" / "speed").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_measurement_has_its_own_name(path: Path) -> None:
    assert values.read(path).name == path.stem


def test_a_name_keeps_the_words_of_a_processor_apart(measured: values.Speed) -> None:
    facts = {**measured.hardware, "cpu": "AMD EPYC (family 26, model 2)", "threads": 2}
    assert "_AMD-EPYC-family-26-model-2_cpu2_" in measured.model_copy(update={"hardware": facts}).name
