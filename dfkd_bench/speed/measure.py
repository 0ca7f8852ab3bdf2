"""Put the figures together: every form of every step, and what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from dfkd_bench import record
from dfkd_bench.compute import prepare, resolve_device, resolve_precision
from dfkd_bench.errors import UserError
from dfkd_bench.plugins import Plugins
from dfkd_bench.speed import peak
from dfkd_bench.speed.bench import Question, configure, temporary_home
from dfkd_bench.speed.forms import EVALUATION, GENERATOR, LOADED, STUDENT, TEACH, Facts, Seconds
from dfkd_bench.speed.order import Order
from dfkd_bench.speed.plain import METHOD
from dfkd_bench.speed.turns import take_turns
from dfkd_bench.speed.values import Machine, Row, Speed, cell, row
from dfkd_bench.suite import parse_pair

__all__ = ["METHOD", "Question", "measure"]

Report = Callable[[int, int], None]
"""Told of repeats done, and of how many there are."""


def measure(
    asked: Question,
    found: Plugins,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 1,
    report: Report = lambda done, count: None,
) -> Speed:
    """Measure all forms of all steps that there are.

    ``threads``: of torch on the CPU. The peak is measured before and after each round. Raises ``UserError`` for an
    unknown method or model, a device that isn't there, sizes that are too small, and for a method that can't do such a
    task.
    """
    _check(asked, found)
    where = resolve_device(device)
    prepare(where)
    torch.set_num_threads(threads)
    chosen = resolve_precision(precision, where, asked.side)
    names = ["ours", *(["exact"] if chosen != "fp32" else []), "plain", "released"]
    orders = [Order(name, asked, where, chosen, threads, found.files) for name in names]
    machine = peak.measure(where, chosen)
    done = 0

    def between() -> None:
        nonlocal machine, done
        done += 1
        if done % len(names) == 0:
            machine = peak.best_of(machine, peak.measure(where, chosen))
        report(done, asked.repeat * len(names))

    rounds: dict[str, list[Seconds]] = {}
    facts: dict[str, Facts] = {}
    with temporary_home():
        for name, seconds, known in take_turns(orders, asked.repeat, between):
            rounds[name], facts[name] = seconds, known
    ours = facts["ours"]
    return Speed(
        method=asked.method,
        config=ours.config,
        pair=asked.pair,
        batch=asked.batch,
        synthesis_batch=asked.synthesis_batch,
        image_shape=asked.image_shape,
        classes=asked.classes,
        precision=chosen,
        steps=asked.steps,
        repeat=asked.repeat,
        rows=_rows(rounds, facts, machine, chosen),
        png_seconds=facts["released"].png_seconds if "released" in facts else None,
        machine=machine,
        epoch=ours.epoch,
        peak_memory={
            "fp32" if name == "exact" else name: known.memory
            for name, known in facts.items()
            if known.memory is not None
        },
        profiles=ours.profiles,
        hardware=ours.hardware,
        software=record.software(),
        git=record.git_state(),
        measured=record.now(),
    )


def _check(asked: Question, found: Plugins) -> None:
    """What can be told before processes are started for it."""
    least = {"batch": 2, "synthesis_batch": 2, "side": 8, "classes": 2, "channels": 1, "steps": 1, "repeat": 1}
    for name, limit in least.items():
        value = getattr(asked, name)
        if value < limit:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {limit}")
    if asked.channels not in (1, 3):
        raise UserError(f"--channels {asked.channels}: expected 1 or 3, as in image files")
    parse_pair(asked.pair, found)
    configure(found.method(asked.method), asked)


def _rows(
    rounds: dict[str, list[Seconds]], facts: dict[str, Facts], machine: Machine, precision: Literal["fp32", "bf16"]
) -> tuple[Row, ...]:
    """The work is counted in the plain form or else in fp32, where no fast path is hidden from the counter."""
    works = next(facts[name].works for name in ("plain", "exact", "ours") if name in facts)
    made = []
    for name in (GENERATOR, STUDENT, LOADED, TEACH, EVALUATION):
        if name not in rounds["ours"][0]:
            continue
        count, work = facts["ours"].images[name], works[name]
        cells = {
            form: cell(
                [seconds[name] for seconds in turns],
                count,
                work,
                precision if form == "ours" else "fp32",
                machine,
                ordinary=form in ("plain", "released"),
            )
            for form, turns in rounds.items()
            if name in turns[0]
        }
        made.append(row(name, count, work, **cells))
    return tuple(made)
