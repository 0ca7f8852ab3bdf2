"""DFND: Learning Student Networks in the Wild (Data-Free Noisy Distillation).

Hanting Chen, Tianyu Guo, Chang Xu, Wenshuo Li, Chunjing Xu, Chao Xu, Yunhe Wang; CVPR 2021.
https://openaccess.thecvf.com/content/CVPR2021/html/Chen_Learning_Student_Networks_in_the_Wild_CVPR_2021_paper.html
Code: https://github.com/huawei-noah/Efficient-Computing, Data-Efficient-Model-Compression/DFND.

Instead of making images, take those of a large unlabelled pool on which the teacher is surest. Its labels are wrong on
some of them: a matrix of confusions, learnt with the student, stands between the student and those labels.

Differences from the paper
1. Its abstract was at hand and its code, not its text: this is the method of the released code.

Differences from the released code
1. The released script cannot run: it uses names that it never defines. What it plainly means to do is done.
2. Pool images are normalised as the teacher's own; the released script takes ImageNet's mean and deviation for them.
3. How much is selected is a share of the pool: 600,000 of ImageNet's 1,281,167 images there.
4. The cross entropy is computed in logarithms, and only for the teacher's label of each image.
5. The teacher's accuracy, there a constant of each data set, is a setting. It was measured on real data with labels, so
   it is knowledge beside the teacher's weights, and the record says so.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.augment import to_unit
from dfkd_bench.losses import kl_divergence, log_confusion, noisy_cross_entropy
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.shuffle import Shuffle

CARD = {
    "title": "DFND: the pool's images of which the teacher is sure, with its label noise learnt",
    "family": "selection",
    "year": 2021,
    "venue": "CVPR",
    "confirmed": True,
    "knowledge": "an unlabelled pool; the teacher's accuracy",
}


class Config(MethodConfig):
    """Defaults: the released script (DFND-train.py); pool and accuracy are the user's."""

    temperature: float = Field(4.0, gt=0, le=1000, description="T of the student's KL divergence (code)")
    pool: str = Field("glyphs16", description="a data set's name, or folder:PATH with any images below it (ours)")
    selected: float = Field(
        0.468323, gt=0, le=1, description="share of the pool that is taken; `num_select` of ImageNet's images (code)"
    )
    teacher_accuracy: float = Field(
        0.95, gt=0, lt=1, description="share of the teacher's labels that are right (code: a constant a data set)"
    )
    noisy: float = Field(1.0, ge=0, description="weight of the cross entropy to the teacher's noisy labels (code: 1)")
    noise_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the matrix of confusions (code)")
    selection_batch_size: int = Field(256, ge=1, le=100_000, description="images at a time in the selection (code)")


class Confusions(nn.Module):
    """What the teacher takes each class for: its accuracy on the diagonal, the rest of each row is learnt."""

    def __init__(self, classes: int, accuracy: float) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.zeros(classes, classes - 1))
        self.accuracy = accuracy

    def forward(self) -> Tensor:
        """Logarithms of the probabilities, [K, K]: rows are the truth, columns what the teacher says."""
        return log_confusion(self.free, self.accuracy)


def unsureness(logits: Tensor) -> Tensor:
    """Cross entropy of each row [n] of ``logits`` [n, K] to its own argmax: 0 if sure, at most ln K."""
    return logits.logsumexp(dim=1) - logits.amax(dim=1)


class Dfnd(Method):
    """The method. The first call selects; the student's batches come from the selection, pass after pass."""

    Config = Config
    needs = frozenset({"unlabelled"})
    tiny: ClassVar = {"pool": "digits", "selected": 0.5}  # always at hand

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.confusions = Confusions(task.num_classes, config.teacher_accuracy).to(task.device)
        self.optimizer = torch.optim.Adam(self.confusions.parameters(), lr=config.noise_lr, fused=True)
        self.shuffle = Shuffle(task.rng, task.device)
        self.chosen: Tensor | None = None  # row numbers of the pool, the surest first

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        if self.chosen is None:
            self.chosen = self._select()
        return Synthesis(None)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """Selected images, augmented as in training."""
        assert self.chosen is not None  # the first call of `synthesize` comes before
        rows = self.chosen[self.shuffle.next(self.chosen.shape[0], size)]
        return Batch(self.task.normalize(self.task.augment(to_unit(self._pool()[rows]))))

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """KL to the teacher, and the cross entropy to its labels behind the matrix of confusions."""
        logits, targets = student(batch.images), self.task.teach(batch.images)
        noisy = noisy_cross_entropy(logits, targets.argmax(dim=1), self.confusions())
        return kl_divergence(logits, targets, self.config.temperature) + self.config.noisy * noisy

    def after_student_step(self, student: nn.Module, batch: Batch, at: Progress) -> None:
        """The matrix steps with the student, on the gradient of the same loss."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _select(self) -> Tensor:
        """The rows of the pool of which the teacher is surest."""
        images = self._pool()
        scores = torch.cat(
            [
                unsureness(self.task.teach(self.task.normalize(to_unit(part))))
                for part in images.split(self.config.selection_batch_size)
            ]
        )
        wanted = max(2, round(self.config.selected * scores.shape[0]))  # BatchNorm needs two
        return scores.topk(min(wanted, scores.shape[0]), largest=False).indices

    def _pool(self) -> Tensor:
        images = self.task.unlabelled
        assert images is not None  # lent because `needs` asks for it
        return images

    @classmethod
    def outside_knowledge(cls, config: Any) -> str | None:
        return f"an unlabelled pool ({config.pool}); the teacher's accuracy"


def _released(accuracy: float) -> Published:
    # 34 = int(40000 / 600000 * 512) minus the one that its loop leaves out; 2344 batches of 256 hold 600,000 images.
    return Published(
        schedule=Schedule(
            epochs=33,
            student_steps=2344,
            batch_size=256,
            lr=0.1,
            weight_decay=5e-4,
            lr_rule="multistep",
            lr_milestones=(13, 27),
        ),
        config={"pool": "imagenet", "teacher_accuracy": accuracy},
        origin="code",
        source="huawei-noah/Efficient-Computing, DFND-train.py",
    )


Dfnd.published = {
    "cifar10/resnet34:resnet18": _released(0.9523),
    "cifar100/resnet34:resnet18": _released(0.7774),
}
Dfnd.published = {
    **Dfnd.published,
    # Other pairs get the values of their own data set.
    **{
        key.partition("/")[0]: entry.model_copy(update={"origin": "transferred"})
        for key, entry in Dfnd.published.items()
    },
}
Dfnd.equal_lr = {"digits": 0.1}  # results/trials/digits_equal.json
Dfnd.search = {
    "selected": (0.25, 0.468323, 1.0),
    "noisy": (0.0, 0.3, 1.0),
    "temperature": (4.0, 20.0),
    "teacher_accuracy": (0.8, 0.95),
    "noise_lr": (1e-3, 1e-2),
    "lr": (0.05, 0.1, 0.2),
}
Dfnd.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, student_steps=30, batch_size=128, lr=0.1, lr_min=2e-4),
        config={"pool": "glyphs16", "selected": 1.0, "noisy": 0.0, "temperature": 20.0},
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, student_steps=30, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            "pool": "digits",
            "selected": 0.25,
            "noisy": 0.0,
            "temperature": 4.0,
            "teacher_accuracy": 0.95,
            "noise_lr": 0.001,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, student_steps=100, batch_size=128, lr=0.1, lr_min=2e-4),
        config={"pool": "digits", "selected": 1.0, "noisy": 0.0, "temperature": 20.0},
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
}
# Where its settings of `smoke` stand has changed, and nothing else.
Dfnd.same_results = ("662d45ae8485cf95dd70b8f9e527e8c5cb7b07e9517305cac4c5630040037aa6",)
