"""DFND: the matrix of confusions, the selection, and that the matrix learns with the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.losses import cross_entropy, kl_divergence, log_confusion, noisy_cross_entropy
from dfkd_bench.method import Batch, Method, Progress, Task
from dfkd_bench.methods.dfnd import Config, Dfnd, unsureness
from dfkd_bench.methods.nayer import Nayer
from dfkd_bench.methods.ood_kd import OutOfDomainConfig, OutOfDomainKD

POOL: Any = None  # the method keeps none
At = Callable[..., Progress]
FREE = torch.arange(6.0).view(3, 2).sin()  # of three classes
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.3, 0.1]])
LABELS = torch.tensor([0, 2])


def pool_of(task: Task) -> Tensor:
    """Forty random images."""
    return torch.randint(256, (40, *task.image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def task(make_task: Callable[..., Task]) -> Task:
    empty = make_task()
    return make_task(unlabelled=pool_of(empty))


def selected(task: Task, student: nn.Module, at: Progress, **fields: Any) -> Dfnd:
    method = Dfnd(Config(**fields), task)
    method.synthesize(student, at)
    return method


def train_mode(student: nn.Module) -> nn.Module:
    return student.train().requires_grad_(True)


# -- The matrix of confusions ---------------------------------------------------------------------------------------


def test_golden_matrix() -> None:
    """By the released script's own way: softmax of each row times 0.1, the accuracy put in between."""
    expected = [
        [0.9, 0.030122507, 0.069877493],
        [0.068312650, 0.9, 0.031687350],
        [0.055035912, 0.044964088, 0.9],
    ]
    torch.testing.assert_close(log_confusion(FREE, 0.9).exp(), torch.tensor(expected))


def test_golden_loss() -> None:
    loss = noisy_cross_entropy(LOGITS, LABELS, log_confusion(FREE, 0.9))
    assert loss.item() == pytest.approx(0.7323950888)


def test_the_released_way_row_by_row() -> None:
    free, accuracy = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), 0.7774
    shares = free.softmax(dim=1) * (1 - accuracy)
    rows = [torch.cat([shares[i, :i], torch.tensor([accuracy]), shares[i, i:]]) for i in range(5)]
    torch.testing.assert_close(log_confusion(free, accuracy).exp(), torch.stack(rows))


def test_a_teacher_that_is_never_wrong_gives_the_cross_entropy() -> None:
    loss = noisy_cross_entropy(LOGITS, LABELS, log_confusion(FREE, 1 - 1e-7))
    torch.testing.assert_close(loss, cross_entropy(LOGITS, LABELS), rtol=1e-5, atol=1e-5)


def test_a_sure_student_need_not_follow_a_wrong_label() -> None:
    """Its loss is bounded by the matrix, however sure it is; the cross entropy is not."""
    logits, label = torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([1])
    loss = noisy_cross_entropy(logits, label, log_confusion(FREE, 0.9))
    torch.testing.assert_close(loss, -log_confusion(FREE, 0.9)[0, 1])
    assert cross_entropy(logits, label) > 50


def test_two_classes_have_one_way_to_be_wrong() -> None:
    expected = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    torch.testing.assert_close(log_confusion(torch.randn(2, 1), 0.8).exp(), expected)


# -- The selection --------------------------------------------------------------------------------------------------


def test_unsureness_is_the_cross_entropy_to_the_own_label() -> None:
    expected = torch.stack([cross_entropy(row[None], row[None].argmax(dim=1)) for row in LOGITS])
    torch.testing.assert_close(unsureness(LOGITS), expected)


@pytest.mark.parametrize("size", [7, 256])
def test_the_surest_share_is_selected(task: Task, student: nn.Module, at: At, size: int) -> None:
    assert task.unlabelled is not None
    scores = unsureness(task.teacher(task.normalize(task.unlabelled / 255)))
    method = selected(task, student, at(0), selected=0.25, selection_batch_size=size)
    assert method.chosen is not None
    assert set(method.chosen.tolist()) == set(scores.argsort()[:10].tolist())


def test_it_is_selected_once(task: Task, student: nn.Module, at: At) -> None:
    method = selected(task, student, at(0), selected=0.5)
    first = method.chosen
    method.synthesize(student, at(1))
    assert method.chosen is first


def test_student_batches_are_of_the_selection_and_cover_it(
    make_task: Callable[..., Task], student: nn.Module, at: At
) -> None:
    plain = make_task(augment=lambda images: images)
    task = make_task(augment=lambda images: images, unlabelled=pool_of(plain))
    assert task.unlabelled is not None
    method = selected(task, student, at(0), selected=0.25)
    seen = torch.cat([method.student_batch(POOL, 5, at(0)).images for _ in range(2)])
    assert method.chosen is not None
    wanted = task.normalize(task.unlabelled[method.chosen] / 255)
    torch.testing.assert_close(seen.flatten(1).sort(dim=0).values, wanted.flatten(1).sort(dim=0).values)


def test_no_image_passes_the_teacher_with_gradient(task: Task, student: nn.Module, at: At) -> None:
    seen: list[bool] = []
    task.teacher.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.requires_grad))
    selected(task, student, at(0))
    assert seen == [False]


# -- The student's steps --------------------------------------------------------------------------------------------


def test_the_loss_is_both_terms(task: Task, student: nn.Module, at: At) -> None:
    method = Dfnd(Config(noisy=0.3, teacher_accuracy=0.8), task)
    batch = Batch(torch.randn(6, *task.image_shape))
    logits, targets = train_mode(student)(batch.images), task.teacher(batch.images)
    matrix = log_confusion(torch.zeros(5, 4), 0.8)
    expected = kl_divergence(logits, targets, 4.0) + 0.3 * noisy_cross_entropy(logits, targets.argmax(1), matrix)
    torch.testing.assert_close(method.student_loss(student, batch, at(0)), expected)


def test_the_matrix_learns_what_the_teacher_confuses(task: Task, at: At) -> None:
    """A student that says class 0 where the teacher says 1: the chance of 1 where 0 is true grows."""
    method = Dfnd(Config(noise_lr=0.1, noisy=1.0), task)

    class Always(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([9.0, 0, 0, 0, 0]).expand(images.shape[0], 5).clone().requires_grad_()

    ones = torch.tensor([0.0, 9, 0, 0, 0]).expand(8, 5)
    batch = Batch(torch.zeros(8, *task.image_shape))
    object.__setattr__(task, "teach", lambda _images: ones)
    for _ in range(20):
        method.student_loss(Always(), batch, at(0)).backward()
        method.after_student_step(Always(), batch, at(0))
    learnt = method.confusions().exp()
    assert learnt[0, 1] > 0.04
    assert learnt[0, 0].item() == pytest.approx(0.95)
    assert learnt[0].sum().item() == pytest.approx(1.0)


def test_the_matrix_does_not_step_on_old_gradients(task: Task, student: nn.Module, at: At) -> None:
    method = Dfnd(Config(), task)
    batch = Batch(torch.randn(6, *task.image_shape))
    method.student_loss(train_mode(student), batch, at(0)).backward()
    method.after_student_step(student, batch, at(0))
    assert method.confusions.free.grad is None


def test_the_record_names_the_pool_and_the_accuracy() -> None:
    said = Dfnd.outside_knowledge(Config(pool="folder:/photos"))
    assert said == "an unlabelled pool (folder:/photos); the teacher's accuracy"


def test_published_settings() -> None:
    """Of the script: int(40000 / 600000 * 512) = 34 epochs of 600,000 images, of which its loop leaves out one."""
    entry = Dfnd.published["cifar10/resnet34:resnet18"]
    assert (entry.schedule.epochs, entry.schedule.lr_milestones, entry.schedule.weight_decay) == (33, (13, 27), 5e-4)
    assert entry.schedule.student_steps == -(-600_000 // 256)
    assert round(Config().selected * 1_281_167) == 600_000
    assert entry.config["teacher_accuracy"] == 0.9523
    assert Dfnd.published["cifar100/resnet34:resnet18"].config["teacher_accuracy"] == 0.7774


# -- Pools, of this method and of the control that takes all images of one --------------------------------------------

POOLS = [(method, dataset) for method in (Dfnd, OutOfDomainKD) for dataset in sorted(method.smoke)]


@pytest.mark.parametrize(("method", "dataset"), POOLS)
def test_smoke_pools_need_no_download_and_are_another_data_set(method: type[Method], dataset: str) -> None:
    pool = method.smoke[dataset].config["pool"]
    assert pool in ("digits", "glyphs16")
    assert pool != dataset
    steps = {"digits": 240, "fashion_mnist": 300, "glyphs16": 2000}
    assert method.smoke[dataset].schedule.total_student_steps == steps[dataset]
    assert method.smoke[dataset].schedule.batch_size == 128


def test_the_default_pool_needs_no_download() -> None:
    assert Config().pool == OutOfDomainConfig().pool == "glyphs16"


def test_the_control_trains_like_the_lead_method() -> None:
    """Controls have the schedule of a table's first method; this one has settings, and so a schedule, of its own."""
    lead, own = Nayer.smoke["digits"].schedule, OutOfDomainKD.smoke["digits"].schedule
    assert own == lead.model_copy(update={"epochs": lead.epochs - lead.warmup_epochs, "warmup_epochs": 0})
