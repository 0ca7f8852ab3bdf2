"""Each measure on images whose answer is known, and what measuring does to a run: nothing."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dfkd_bench import data, diversity, plugins, record, teachers
from dfkd_bench.augment import Normalize
from dfkd_bench.compute import Compute
from dfkd_bench.diversity import (
    OnePass,
    Seen,
    class_balance,
    density_and_coverage,
    distinct,
    duplicates,
    evenly_spaced,
    keepsakes,
    look,
    measure,
    pairwise_distances,
    unanswered,
)
from dfkd_bench.job import Job
from dfkd_bench.method import Task
from dfkd_bench.paths import HOME_VARIABLE, home
from dfkd_bench.record import Record
from dfkd_bench.run import EpochDone, Place, run
from dfkd_bench.suite import expand, make_suite


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits_for(answers: list[int], classes: int) -> Tensor:
    """Certain answers."""
    return 100.0 * torch.eye(classes)[answers]


def seen(answers: list[int], classes: int = 3, seed: int = 0) -> Seen:
    images = (random(len(answers), 1, 4, 4, seed=seed) * 256).to(torch.uint8)
    return Seen(images, random(len(answers), 6, seed=seed), logits_for(answers, classes))


# -- Distances ------------------------------------------------------------------------------------------------------


def test_distances_of_two_clusters() -> None:
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 3.0]], dtype=torch.float64)
    within, between = pairwise_distances(features, torch.tensor([4, 4, 7, 7]))
    assert within == pytest.approx((1 + 3) / 2)
    assert between == pytest.approx((10 + math.hypot(10, 3) + math.hypot(10, 1) + math.hypot(10, 2)) / 4)


def test_a_class_that_comes_often_counts_as_much_as_others() -> None:
    close = torch.zeros(50, 1, dtype=torch.float64)
    far = torch.tensor([[100.0], [108.0]], dtype=torch.float64)
    within, _ = pairwise_distances(torch.cat([close, far]), torch.tensor([0] * 50 + [1] * 2))
    assert within == pytest.approx((0 + 8) / 2)


def test_distances_are_those_of_a_loop_over_pairs() -> None:
    features, classes = random(40, 7), torch.arange(40) % 3
    own: dict[int, list[float]] = {}
    apart: dict[tuple[int, int], list[float]] = {}
    for i, j in itertools.combinations(range(40), 2):
        distance = (features[i] - features[j]).norm().item()
        a, b = sorted((int(classes[i]), int(classes[j])))
        (own.setdefault(a, []) if a == b else apart.setdefault((a, b), [])).append(distance)
    within, between = pairwise_distances(features, classes)
    assert within == pytest.approx(sum(sum(d) / len(d) for d in own.values()) / len(own))
    assert between == pytest.approx(sum(sum(d) / len(d) for d in apart.values()) / len(apart))


def test_without_pairs_there_is_no_distance() -> None:
    assert pairwise_distances(random(3, 2), torch.tensor([1, 1, 1]))[1] is None
    assert pairwise_distances(random(3, 2), torch.tensor([0, 1, 2]))[0] is None


# -- Density and coverage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_are_those_of_the_definition(k: int) -> None:
    real, made = random(25, 3, seed=1), random(30, 3, seed=2) * 0.7
    radius = [sorted((real[i] - real[j]).norm().item() for j in range(25) if j != i)[k - 1] for i in range(25)]
    held = [[(real[i] - made[j]).norm().item() < radius[i] for j in range(30)] for i in range(25)]
    density, coverage = density_and_coverage(made, real, k)
    assert density == pytest.approx(sum(map(sum, held)) / (k * 30))
    assert coverage == pytest.approx(sum(map(any, held)) / 25)


def test_images_like_the_real_ones_have_density_and_coverage_of_about_one() -> None:
    density, coverage = density_and_coverage(random(800, 4, seed=1), random(800, 4, seed=2))
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.03)  # Naeem et al., section 4: its mean at equal numbers, k = 5


def test_one_image_repeated_in_the_midst_is_dense_and_covers_little() -> None:
    real = random(200, 2)
    density, coverage = density_and_coverage(real.mean(dim=0, keepdim=True).expand(50, -1), real)
    assert density is not None
    assert density > 0.5
    assert coverage is not None
    assert coverage < 0.1


def test_images_far_away_have_none() -> None:
    assert density_and_coverage(random(20, 3) + 100, random(20, 3)) == (0.0, 0.0)


def test_too_few_real_images_for_a_neighbourhood() -> None:
    assert density_and_coverage(random(20, 3), random(5, 3)) == (None, None)


# -- Answers --------------------------------------------------------------------------------------------------------


def test_balance_of_uniform_answers_is_one() -> None:
    assert class_balance(logits_for([0, 1, 2, 3], 4)) == pytest.approx(1)


def test_balance_of_one_answer_is_zero() -> None:
    assert class_balance(logits_for([2, 2, 2], 4)) == pytest.approx(0, abs=1e-12)


def test_balance_between_two_of_four_classes_is_a_half() -> None:
    assert class_balance(logits_for([0, 1], 4)) == pytest.approx(0.5)


def test_classes_that_are_never_named() -> None:
    assert unanswered(logits_for([0, 3, 3], 5)) == 3


# -- Duplicates -----------------------------------------------------------------------------------------------------


def test_all_equal_images_are_duplicates() -> None:
    assert duplicates(torch.full((6, 3, 4, 4), 9, dtype=torch.uint8)) == (1.0, 1.0)


def test_two_of_eight_are_equal() -> None:
    images = (random(8, 1, 8, 8) * 256).to(torch.uint8)
    images[5] = images[2]
    assert duplicates(images) == (0.25, 0.25)


@pytest.mark.parametrize(("steps", "near"), [(5, 0.5), (6, 0.0)])  # of 255: 0.0196 and 0.0235
def test_near_duplicates_end_at_the_threshold(steps: int, near: float) -> None:
    images = (random(4, 1, 8, 8) * 200).to(torch.uint8)
    images[1] = images[0] + steps
    assert duplicates(images) == (0.0, near)


def test_large_images_are_compared_at_a_smaller_size() -> None:
    fine = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(1, 1, 64, 64)  # stripes that averaging takes away
    images = torch.cat([fine, 255 - fine])
    assert duplicates(images) == (0.0, 1.0)


def test_a_single_image_has_no_double() -> None:
    assert duplicates(torch.zeros(1, 1, 4, 4, dtype=torch.uint8)) == (0.0, 0.0)


# -- All together ---------------------------------------------------------------------------------------------------


def test_images_measured_against_themselves_are_as_diverse() -> None:
    both = seen([0, 1, 2] * 4)
    found = measure(both, both)
    assert (found["within"], found["between"], found["class_balance"]) == (1.0, 1.0, 1.0)
    assert (found["images"], found["real_images"], found["unanswered"]) == (12, 12, 0)


def test_what_is_not_defined_is_none() -> None:
    found = measure(seen([0, 0, 0]), seen([0, 1, 2]))
    assert (found["between"], found["between_raw"]) == (None, None)  # one class was made
    assert found["within_raw"] is not None
    assert found["within"] is None  # one real image a class
    assert (found["density"], found["coverage"]) == (None, None)


def test_collapse_of_a_class_lowers_the_distance_within() -> None:
    real = seen([0, 1, 2] * 8)
    made = Seen(real.images, real.features * 0.5, real.logits)
    assert measure(made, real)["within"] == pytest.approx(0.5)


# -- The sample -----------------------------------------------------------------------------------------------------


def test_what_the_teacher_sees_is_what_it_answers(task: Task) -> None:
    images = torch.rand(7, 1, 8, 8)
    found = look(task.teacher, [task.normalize(images[:4]), task.normalize(images[4:])], task.normalize)
    logits, features, _ = task.teacher.features(task.normalize(images))
    assert torch.allclose(found.logits, logits, atol=1e-5)
    assert torch.allclose(found.features, features.double(), atol=1e-5)


def test_eight_bit_images_come_back_as_they_were(task: Task) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    normalize = Normalize([0.4914], [0.2023])
    assert torch.equal(look(task.teacher, [normalize(images / 255)], normalize).images, images)


def test_no_more_is_looked_at_than_asked_for(task: Task) -> None:
    endless = (torch.rand(5, 1, 8, 8) for _ in itertools.count())
    assert look(task.teacher, endless, task.normalize, limit=12).images.shape[0] == 12


@pytest.mark.parametrize("size", [5, 9])  # the second batch is cut off in one of the two
def test_a_method_that_repeats_its_batch_has_no_others(size: int, task: Task) -> None:
    batch = torch.rand(size, 1, 8, 8)
    assert look(task.teacher, itertools.repeat(batch), task.normalize, limit=12).images.shape[0] == size


def test_distinct_keeps_the_first_of_equal_images() -> None:
    before = seen([0, 1, 2, 0])
    before.images[3] = before.images[1]
    after = distinct(before)
    assert torch.equal(after.images, before.images[:3])
    assert torch.equal(after.features, before.features[:3])


def test_ten_images_a_class_are_kept_in_the_order_of_classes() -> None:
    kept = keepsakes(seen([2] * 12 + [0] * 3))
    assert kept["classes"].tolist() == [0] * 3 + [2] * 10
    assert kept["images"].dtype == torch.uint8
    assert kept["confidence"].tolist() == [1.0] * 13


def test_of_many_classes_some_are_kept() -> None:
    kept = keepsakes(seen(list(range(300)), classes=300))
    assert kept["classes"].tolist() == evenly_spaced(300, 100)


def test_a_pass_over_the_pool_shows_every_image_once() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    view = OnePass(images, {"row": torch.arange(10)}, torch.Generator().manual_seed(0), torch.device("cpu"))
    drawn = [view.draw_with_extras(4) for _ in range(3)]
    assert sorted(torch.cat([extras["row"] for _, extras in drawn]).tolist()) == list(range(10))
    assert all(torch.equal(part.mul(255).round().flatten().long(), extras["row"]) for part, extras in drawn)


# -- Runs -----------------------------------------------------------------------------------------------------------

TINY = {
    "teacher.epochs": 2,
    "nayer.epochs": 3,
    "nayer.warmup_epochs": 1,
    "nayer.student_steps": 2,
    "nayer.batch_size": 16,
    "nayer.synthesis_batch_size": 12,
    "nayer.generator_steps": 2,
    "nayer.warmup_loops": 2,
    "nayer.loops": 2,
    "nayer.noisy_width": 8,
    "nayer.generator_width": 4,
    "nayer.encoder": "random:16",
}
TINY |= {
    f"{name}.{setting}": value
    for name in ("zskt", "pre_dfkd", "real_kd", "scratch", "noise_kd")
    for setting, value in {"epochs": 2, "warmup_epochs": 0, "student_steps": 2, "batch_size": 16}.items()
}

TINY |= {f"pre_dfkd.{name}": 8 for name in ("synthesis_batch_size", "latent_dim", "generator_width")}
TINY |= {"zskt.synthesis_batch_size": 12, "zskt.latent_dim": 8, "zskt.generator_width": 4, "zskt.generator_steps": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with digits and a teacher of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("home")
        patch.setenv(HOME_VARIABLE, str(place))
        torch.set_num_threads(1)
        teachers.train(data.dataset("digits"), job_of("nayer").teacher, Compute(torch.device("cpu")))
        yield place


@pytest.fixture
def fresh(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``fresh(name)``: from now on a home of that name with the same data and teacher, without runs."""

    def change(name: str) -> None:
        shutil.copytree(prepared, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
        monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / name))

    change("first")
    return change


def job_of(method: str) -> Job:
    settings = {name: value for name, value in TINY.items() if name.partition(".")[0] in ("teacher", method)}
    suite = make_suite("test", "test", "digits", [method], pairs=["convnet8:convnet8"], controls=(), settings=settings)
    (job,) = expand(suite, plugins.discover(), data.dataset("digits"), "cpu", "fp32")
    return job


def file_of(found: Record, name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(home() / "runs" / found.job_id / name)


def test_a_run_records_what_its_pool_is_like(fresh: Callable[[str], None], tmp_path: Path) -> None:
    found = run(job_of("nayer"), Place(tmp_path, device="cpu"))
    assert found.diversity["images"] == found.counters.images_made == 72  # all of them, and none twice
    assert found.diversity["duplicates"] is not None
    assert set(file_of(found, "images.safetensors")) == {"images", "classes", "confidence"}
    assert record.read(record.record_path(tmp_path, found.job)) == found


@pytest.mark.parametrize("method", ["zskt", "noise_kd", "pre_dfkd"])  # the last one tunes latents: it takes gradients
def test_without_a_pool_further_student_batches_are_measured(
    method: str, fresh: Callable[[str], None], tmp_path: Path
) -> None:
    found = run(job_of(method), Place(tmp_path, device="cpu"))
    assert found.diversity["images"] == 2000


def test_real_images_are_as_diverse_as_real_images(fresh: Callable[[str], None], tmp_path: Path) -> None:
    done = run(job_of("real_kd"), Place(tmp_path, device="cpu"))
    found = done.diversity
    distinct_ones = {image.tobytes() for image in data.dataset("digits").split("train").images}
    assert found["images"] is not None
    assert 0.95 * len(distinct_ones) < found["images"] <= len(distinct_ones)  # 2,000 were drawn
    kept = file_of(done, "images.safetensors")["images"].numpy()
    assert {image.tobytes() for image in kept} <= distinct_ones  # as they are, not augmented
    assert found["within"] == pytest.approx(1, abs=0.1)
    assert found["between"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] == pytest.approx(1, abs=0.1)
    assert found["duplicates"] is None


@pytest.mark.parametrize("method", ["nayer", "zskt", "scratch"])
def test_measuring_changes_nothing(
    method: str, fresh: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = run(job_of(method), Place(tmp_path / "a", device="cpu"))
    weights = file_of(measured, "student.safetensors")
    fresh("second")

    def refuse(*_: object, **__: object) -> Seen:
        raise RuntimeError("no measuring")

    monkeypatch.setattr(diversity, "look", refuse)
    plain = run(job_of(method), Place(tmp_path / "b", device="cpu"))
    assert plain.diversity == {}
    assert measured.diversity
    assert plain.counters == measured.counters
    assert [point.accuracy for point in plain.curve] == [point.accuracy for point in measured.curve]
    assert all(torch.equal(weights[name], tensor) for name, tensor in file_of(plain, "student.safetensors").items())


def test_what_goes_wrong_in_measuring_costs_no_run(
    fresh: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(diversity, "measure", broken)
    found = run(job_of("nayer"), Place(tmp_path, device="cpu"))
    assert (found.status, found.diversity) == ("done", {})
    assert "out of memory" in (home() / "runs" / found.job_id / "log.txt").read_text()


@pytest.mark.parametrize("method", ["nayer", "zskt"])
def test_a_resumed_run_measures_the_same(method: str, fresh: Callable[[str], None], tmp_path: Path) -> None:
    whole = run(job_of(method), Place(tmp_path / "whole", device="cpu"))
    images = file_of(whole, "images.safetensors")
    fresh("second")

    def stop(done: EpochDone) -> None:
        if done.epoch == done.epochs - 1:
            raise KeyboardInterrupt

    place = Place(tmp_path / "parts", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(job_of(method), place, stop)
    resumed = run(job_of(method), place)
    assert resumed.diversity == whole.diversity
    assert all(torch.equal(images[name], rows) for name, rows in file_of(resumed, "images.safetensors").items())


def test_measuring_is_no_headline_time(fresh: Callable[[str], None], tmp_path: Path) -> None:
    found = run(job_of("nayer"), Place(tmp_path, device="cpu"))
    assert found.seconds["measuring"] > 0
    counted = ("setup", "synthesis", "sampling", "distillation")
    assert found.total_seconds == pytest.approx(sum(found.seconds[name] for name in counted))


def test_records_made_before_there_were_measures_still_load(fresh: Callable[[str], None], tmp_path: Path) -> None:
    found = run(job_of("noise_kd"), Place(tmp_path, device="cpu"))
    path = record.record_path(tmp_path, found.job)
    old = json.loads(path.read_text())
    del old["diversity"], old["seconds"]["measuring"]
    path.write_text(json.dumps(old))
    assert record.read(path).diversity == {}
