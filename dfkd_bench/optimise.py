"""The student's optimiser and learning rate, from a ``Schedule``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from dfkd_bench.method import Schedule


def build_optimizer(parameters: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """SGD (no Nesterov) or Adam with weight decay on all parameters, as one fused kernel."""
    if schedule.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay, fused=True
    )


def learning_rate(schedule: Schedule, done: int) -> float:
    """The learning rate after ``done`` finished epochs in which the student was trained.

    Cosine: ``min + (lr - min) / 2 * (1 + cos(pi * done / horizon))``, the horizon being the epochs after the warm-up
    unless the schedule names one. Source: the closed form of torch's CosineAnnealingLR, as in NAYER's datafree_kd.py.
    """
    if schedule.lr_rule == "constant":
        return schedule.lr
    if schedule.lr_rule == "multistep":
        return schedule.lr * schedule.lr_gamma ** sum(done >= milestone for milestone in schedule.lr_milestones)
    horizon = schedule.lr_horizon or schedule.epochs - schedule.warmup_epochs
    return schedule.lr_min + (schedule.lr - schedule.lr_min) / 2 * (1 + math.cos(math.pi * done / horizon))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
