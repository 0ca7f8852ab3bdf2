from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_bench import data, inversion, text
from dfkd_bench.checkpoint import load_tree, save_tree
from dfkd_bench.losses import kl_divergence, supervised_contrastive
from dfkd_bench.method import Batch, Method, Progress, Task
from dfkd_bench.methods import cae_dfkd
from dfkd_bench.methods.cae_dfkd import CaeDfkd, Config, balanced_labels, diffuse, draw_noise
from dfkd_bench.pool import Pool

B, STEPS, LOOPS, WARMUP_LOOPS = 12, 3, 2, 4
CPU = torch.device("cpu")
At = Callable[..., Progress]
Snapshot = Callable[[nn.Module], dict[str, Tensor]]


def new_method(task: Task, **fields: Any) -> CaeDfkd:
    values = {
        "encoder": "random:16",
        "synthesis_batch_size": B,
        "generator_steps": STEPS,
        "loops": LOOPS,
        "warmup_loops": WARMUP_LOOPS,
        "generator_width": 4,
        "contrast_width": 8,
    }
    torch.manual_seed(0)
    return CaeDfkd(Config(**(values | fields)), task)


def filled_pool(task: Task, size: int = 40) -> Pool:
    pool = Pool(task.image_shape, CPU, torch.Generator().manual_seed(5))
    pool.add(torch.rand(size, *task.image_shape, generator=torch.Generator().manual_seed(6)))
    return pool


def ready(task: Task, student: nn.Module, at: At, **fields: Any) -> tuple[CaeDfkd, Pool]:
    """A method after its first call, and a pool."""
    method = new_method(task, **fields)
    method.synthesize(student, at(0))
    student.train().requires_grad_(True)
    return method, filled_pool(task)


# -- Noise around embeddings ----------------------------------------------------------------------------------------


def test_golden_diffusion() -> None:
    e = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    q = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    assert diffuse(e, 0.1, q).tolist() == pytest.approx([1.05, 1.9, 3.2], rel=1e-12)


FOURTH_MOMENTS = [3.0, 9 / 5, 6.0, 1.0]  # of Gaussian, uniform, Laplace and signs at unit variance


@pytest.mark.parametrize("source", range(4))
def test_sources_are_the_named_distributions(source: int) -> None:
    noise = draw_noise(torch.full((400,), source), 1000, torch.Generator().manual_seed(0)).double()
    moments = [noise.mean().item(), noise.square().mean().item(), noise.pow(4).mean().item()]
    assert moments == pytest.approx([0, 1, FOURTH_MOMENTS[source]], rel=0.02, abs=0.01)


def test_every_row_has_its_own_source() -> None:
    noise = draw_noise(torch.tensor([3, 1, 3]), 500, torch.Generator().manual_seed(0))
    assert [bool((row.abs() == 1).all()) for row in noise] == [True, False, True]
    assert noise[1].abs().max() <= math.sqrt(3)


def test_noise_has_mean_zero_and_the_magnitude_of_its_source(task: Task) -> None:
    method = new_method(task, noise_scale=0.1)
    rms = method.embeddings.square().mean().sqrt().item()
    labels = torch.full((4000,), 2)
    for source in range(4):
        away = method._diffused(labels, torch.full_like(labels, source)) - method.embeddings[2]
        assert away.mean().item() == pytest.approx(0, abs=0.01 * rms)
        assert away.std().item() == pytest.approx(0.1 * (source + 1) * rms, rel=0.02)


def test_without_noise_equal_labels_make_equal_images(task: Task) -> None:
    method, labels, sources = new_method(task, noise_scale=0.0), torch.arange(10) % 5, torch.arange(10) % 4
    diffused = method._diffused(labels, sources)
    assert torch.equal(diffused, method.embeddings[labels])
    images = method.generator(diffused)
    torch.testing.assert_close(images[:5], images[5:])


def test_more_noise_makes_images_of_one_class_differ_more(task: Task) -> None:
    distances = []
    for scale in (0.05, 0.2, 0.8):
        method, labels = new_method(task, noise_scale=scale), torch.arange(200) % 5
        with torch.no_grad():
            images = method.generator(method._diffused(labels, torch.full_like(labels, 0))).flatten(1)
        distances.append(torch.stack([torch.pdist(images[labels == label]).mean() for label in range(5)]).mean().item())
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "digits"])
def test_noise_of_default_magnitude_keeps_the_class(make_task: Callable[..., Task], dataset: str) -> None:
    """On the shipped embeddings the nearest one to a diffused embedding is nearly always that of its own class."""
    names = data.dataset(dataset).class_names
    matrix = torch.as_tensor(text.load(dataset, names, "sbert", "a image of {name}").matrix, dtype=torch.float32)
    method = new_method(make_task(classes=len(names), label_embeddings=lambda encoder, prompt: matrix))
    labels = torch.arange(2000) % len(names)
    nearest = torch.cdist(method._diffused(labels, torch.arange(2000) % 4), matrix).argmin(dim=1)
    assert (nearest == labels).double().mean() > 0.99


# -- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "classes"), [(25, 10), (10, 10), (4, 100)])
def test_labels_are_balanced(size: int, classes: int) -> None:
    counts = balanced_labels(size, classes, torch.Generator().manual_seed(0), CPU).bincount(minlength=classes)
    assert counts.sum() == size
    assert counts.max() - counts.min() <= 1


def test_all_classes_have_their_turn_where_a_batch_is_smaller_than_their_number() -> None:
    rng = torch.Generator().manual_seed(0)
    seen = torch.cat([balanced_labels(4, 20, rng, CPU) for _ in range(100)])
    assert seen.unique().tolist() == list(range(20))


# -- One call -------------------------------------------------------------------------------------------------------


def test_a_call_makes_all_batches_of_its_loops(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    sizes = [len(method.synthesize(student, at(epoch, warmup=1)).images) for epoch in range(3)]  # type: ignore[arg-type]
    assert sizes == [WARMUP_LOOPS * B, LOOPS * B, LOOPS * B]


def test_the_student_is_called_after_the_warm_up_only_and_in_eval_mode(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes = new_method(task), record_modes(student)
    method.synthesize(student, at(1, warmup=2))
    assert modes == []
    method.synthesize(student, at(2, warmup=2))
    assert modes == [False] * (LOOPS * STEPS)


def test_the_adversary_is_the_student(
    make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At
) -> None:
    """Another student, other images; with the teacher as the student the term vanishes."""

    def made(student_of: Callable[[Task], nn.Module], adversarial: float) -> Tensor:
        task = make_task()
        images = new_method(task, adversarial=adversarial).synthesize(student_of(task), at(0)).images
        assert images is not None
        return images

    first, second = made(lambda task: make_student(seed=1), 100.0), made(lambda task: make_student(seed=2), 100.0)
    assert not torch.equal(first, second)
    without = made(lambda task: make_student(seed=1), 0.0)
    torch.testing.assert_close(made(lambda task: task.teacher, 100.0), without)


def test_noise_is_drawn_once_a_batch(task: Task, student: nn.Module, at: At) -> None:
    method, inputs = new_method(task), []
    method.generator.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].clone()))
    method.synthesize(student, at(1))
    assert [torch.equal(inputs[0], other) for other in inputs] == [True] * STEPS + [False] * STEPS


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_images_are_made_of_the_first_sources(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """``noise_sources`` is how many there are; all of them are used."""
    method, seen = new_method(task, noise_sources=number, loops=6, generator_steps=1), []
    diffused = method._diffused
    monkeypatch.setattr(method, "_diffused", lambda labels, sources: seen.append(sources) or diffused(labels, sources))
    method.synthesize(student, at(1))
    assert torch.cat(seen).unique().tolist() == list(range(number))


@pytest.mark.parametrize("number", [0, 5])
def test_there_are_one_to_four_sources(number: int) -> None:
    with pytest.raises(ValidationError, match="noise_sources"):
        Config(noise_sources=number)


@pytest.mark.parametrize(("life", "epochs_built"), [(None, []), (2, [2, 4])])
def test_when_the_generator_is_built_anew(
    task: Task, student: nn.Module, at: At, life: int | None, epochs_built: list[int]
) -> None:
    method, built = new_method(task, generator_life=life), []
    for epoch in range(5):
        before = method.generator
        method.synthesize(student, at(epoch))
        if method.generator is not before:
            built.append(epoch)
    assert built == epochs_built


@pytest.mark.parametrize(("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2)])
def test_the_generators_output_at_the_lowest_loss_is_kept(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    script = iter(losses)
    monkeypatch.setattr(
        inversion, "cross_entropy", lambda x, labels: next(script) + x.square().sum() - x.square().sum().detach()
    )
    method = new_method(task, loops=1, batchnorm=0.0, onehot=1.0, adversarial=0.0)
    outputs: list[Tensor] = []
    method.generator.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().clone()))
    made = method.synthesize(student, at(1))
    assert made.images is not None
    assert [torch.equal(made.images, output) for output in outputs] == [step == best for step in range(STEPS)]
    assert made.scalars["synthesis_loss"].item() == min(losses)


def test_steps_lower_the_loss(task: Task, student: nn.Module, at: At) -> None:
    losses = []
    for steps in (1, 30):
        method = new_method(task, generator_steps=steps, loops=1, adversarial=0.0, batchnorm_momentum=0.0)
        losses.append(method.synthesize(student, at(1)).scalars["synthesis_loss"].item())
    assert losses[1] < 0.8 * losses[0]


def test_teacher_and_embeddings_are_constants(task: Task, student: nn.Module, at: At, snapshot: Snapshot) -> None:
    before = snapshot(task.teacher)
    method, pool = ready(task, student, at)
    embeddings = task.label_embeddings("random:16", "")
    method.student_loss(student, method.student_batch(pool, 8, at(0)), at(0)).backward()
    assert torch.equal(method.embeddings, embeddings)
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in task.teacher.parameters())


# -- The contrastive loss -------------------------------------------------------------------------------------------


def written_out(embeddings: Tensor, labels: Tensor, temperature: float) -> float:
    """The card's formula with plain loops."""
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).tolist()
    similar = [[math.exp(sum(map(math.prod, zip(a, b, strict=True))) / temperature) for b in unit] for a in unit]
    rows = []
    for a in range(len(unit)):
        others = [j for j in range(len(unit)) if j != a]
        positives = [j for j in others if labels[j] == labels[a]]
        if positives:
            everything = sum(similar[a][j] for j in others)
            rows.append(-sum(math.log(similar[a][j] / everything) for j in positives) / len(positives))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 3, 0]])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_supervised_contrastive_is_the_formula_written_out(labels: list[int], temperature: float) -> None:
    embeddings = torch.arange(24, dtype=torch.float64).sin().view(6, 4)
    wanted = torch.tensor(labels)
    got = supervised_contrastive(embeddings, wanted, temperature)
    assert got.item() == pytest.approx(written_out(embeddings, wanted, temperature), rel=1e-10)


def test_supervised_contrastive_does_not_depend_on_the_order() -> None:
    embeddings, labels = torch.arange(60, dtype=torch.float64).sin().view(12, 5), torch.arange(12) % 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    one, other = (supervised_contrastive(embeddings[rows], labels[rows], 0.1) for rows in (torch.arange(12), order))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


def test_supervised_contrastive_is_zero_without_positives_and_has_a_gradient_with() -> None:
    embeddings = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert supervised_contrastive(embeddings, torch.arange(4), 0.1).item() == 0
    assert torch.autograd.gradcheck(lambda e: supervised_contrastive(e, torch.tensor([0, 0, 1, 1]), 0.5), embeddings)


# -- Student steps --------------------------------------------------------------------------------------------------


def test_a_student_batch_is_pool_images_and_pairs(task: Task, student: nn.Module, at: At) -> None:
    method, pool = ready(task, student, at)
    batch = method.student_batch(pool, 8, at(0))
    assert batch.images.shape == (16, *task.image_shape)
    assert batch.parts == {"pool": slice(0, 8), "pairs": slice(8, 16)}
    labels = batch.extras["labels"]
    assert labels[:8].tolist() == [-1] * 8
    assert torch.equal(labels[8:12], labels[12:])


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_two_of_a_pair_have_different_sources(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    method, pool = ready(task, student, at, noise_sources=number)
    seen: list[Tensor] = []
    monkeypatch.setattr(method, "_diffused", lambda labels, sources: seen.append(sources) or method.embeddings[labels])
    for _ in range(20):
        method.student_batch(pool, 16, at(0))
    one, other = torch.stack(seen).chunk(2, dim=1)
    assert torch.stack(seen).unique().tolist() == list(range(number))
    assert bool((one != other).all()) is (number > 1)


def test_pairs_are_un_augmented_images_of_the_present_generator(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, pool = ready(task, student, at)
    outputs: list[Tensor] = []
    method.generator.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().clone()))
    batch = method.student_batch(pool, 8, at(0))
    assert torch.equal(batch.images[batch.parts["pairs"]], task.normalize(outputs[0]))
    assert not batch.images.requires_grad


def test_student_loss_is_kl_of_the_pool_and_the_contrastive_loss_of_the_pairs(
    task: Task, student: nn.Module, at: At
) -> None:
    method, pool = ready(task, student, at, contrast=0.3, contrast_temperature=0.2, temperature=4.0)
    student.eval()
    batch = method.student_batch(pool, 8, at(0))
    logits, features, _ = student.features(batch.images)  # type: ignore[operator]
    assert method.head is not None
    expected = kl_divergence(logits[:8], task.teacher(batch.images[:8]), 4.0) + 0.3 * supervised_contrastive(
        method.head(features[8:]), batch.extras["labels"][8:], 0.2
    )
    torch.testing.assert_close(method.student_loss(student, batch, at(0)), expected)


def test_the_contrastive_loss_has_no_gradient_to_the_generator(task: Task, student: nn.Module, at: At) -> None:
    method, pool = ready(task, student, at)
    method.generator.zero_grad(set_to_none=True)
    method.student_loss(student, method.student_batch(pool, 8, at(0)), at(0)).backward()
    assert all(parameter.grad is None for parameter in method.generator.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_without_the_contrastive_loss_a_student_step_is_the_default_one(
    make_task: Callable[..., Task], student: nn.Module, at: At
) -> None:
    task, same = make_task(), make_task()
    method, pool = ready(task, student, at, contrast=0.0)
    batch = method.student_batch(pool, 8, at(0))
    default = Method.student_batch(new_method(same), filled_pool(same), 8, at(0))
    assert torch.equal(batch.images, default.images)
    assert batch.parts == {}
    assert method.head is None
    student.eval()
    expected = kl_divergence(student(batch.images), task.teacher(batch.images), 20.0)
    torch.testing.assert_close(method.student_loss(student, batch, at(0)), expected)


@pytest.mark.parametrize(("contrast", "size", "rows"), [(0.1, 8, 16), (0.1, 9, 17), (0.0, 9, 9)])
def test_rows_of_a_student_batch(task: Task, student: nn.Module, at: At, contrast: float, size: int, rows: int) -> None:
    method, pool = ready(task, student, at, contrast=contrast)
    assert len(method.student_batch(pool, size, at(0)).images) == rows
    assert CaeDfkd.batch_rows(method.config, size) == rows


def test_the_head_learns_after_a_student_step(task: Task, student: nn.Module, at: At, snapshot: Snapshot) -> None:
    method, pool = ready(task, student, at)
    assert method.head is not None
    before, students = snapshot(method.head), [p.detach().clone() for p in student.parameters()]
    batch = method.student_batch(pool, 8, at(0))
    method.student_loss(student, batch, at(0)).backward()
    method.after_student_step(student, batch, at(0))
    assert not any(torch.equal(value, before[name]) for name, value in method.head.state_dict().items())
    assert all(parameter.grad is None for parameter in method.head.parameters())
    assert all(torch.equal(p, old) for p, old in zip(student.parameters(), students, strict=True))


def test_the_contrastive_loss_brings_the_images_of_a_class_together(task: Task, student: nn.Module, at: At) -> None:
    method, _ = ready(task, student, at, contrast_lr=0.01)
    labels = torch.arange(5).repeat(4)
    with torch.no_grad():
        images = task.normalize(method.generator(method._diffused(labels, torch.arange(20) % 4)))
    batch = Batch(images, {"pool": slice(0, 2), "pairs": slice(0, 20)}, {"labels": labels})
    assert method.head is not None
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.01), []
    for _ in range(30):
        features = student.features(images)[1]  # type: ignore[operator]
        losses.append(supervised_contrastive(method.head(features), labels, 0.1).item())
        optimizer.zero_grad()
        method.student_loss(student, batch, at(0)).backward()
        optimizer.step()
        method.after_student_step(student, batch, at(0))
    assert losses[-1] < 0.7 * losses[0]


# -- Resume and facts -----------------------------------------------------------------------------------------------


def test_a_resumed_method_goes_on_with_its_head(
    make_task: Callable[..., Task], student: nn.Module, at: At, tmp_path: Path
) -> None:
    method, pool = ready(make_task(), student, at)
    batch = method.student_batch(pool, 8, at(0))
    method.student_loss(student, batch, at(0)).backward()
    method.after_student_step(student, batch, at(0))
    save_tree(tmp_path / "state", method.state_dict())
    resumed = new_method(make_task())
    resumed.load_state_dict(load_tree(tmp_path / "state"))
    for each in (method, resumed):
        each.student_loss(student.eval(), batch, at(0)).backward()
        each.after_student_step(student, batch, at(0))
    assert method.head is not None
    assert resumed.head is not None
    for one, other in zip(method.head.parameters(), resumed.head.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("encoder", "prompt", "known"),
    [
        ("sbert", "a image of {name}", None),  # what the card says: class names and a text encoder
        ("sbert", "class {index}", "a text encoder (index prompt)"),
        ("sbert", "P2", None),
        ("sbert", "P3", "a text encoder (index prompt)"),
        ("random:16", "a image of {name}", "none"),
        ("onehot", "a image of {name}", "none"),
    ],
)
def test_outside_knowledge(encoder: str, prompt: str, known: str | None) -> None:
    assert CaeDfkd.outside_knowledge(Config(encoder=encoder, prompt=prompt)) == known


def test_the_card_says_that_details_are_unconfirmed() -> None:
    assert cae_dfkd.CARD["confirmed"] is False
    assert {entry.origin for entry in CaeDfkd.published.values()} == {"ours"}
