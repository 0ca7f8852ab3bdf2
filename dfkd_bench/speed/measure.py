"""Put the figures together: every form of every step, one after the other, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch

from dfkd_bench import record
from dfkd_bench.checkpoint import seed_everything
from dfkd_bench.clock import peak_memory
from dfkd_bench.compute import hardware, prepare, resolve_device, resolve_precision, set_threads
from dfkd_bench.errors import UserError
from dfkd_bench.plugins import Plugins
from dfkd_bench.speed import peak, profiling
from dfkd_bench.speed.bench import Bench, Question, temporary_home
from dfkd_bench.speed.plain import METHOD, Plain, keep_on_device
from dfkd_bench.speed.released_manner import ReleasedManner
from dfkd_bench.speed.timing import Work, middle, per, repeated, seconds_of, synchronize, work_of
from dfkd_bench.speed.values import Machine, Operator, Row, Speed, cell, row

__all__ = ["METHOD", "Question", "measure"]

T = TypeVar("T")
Seconds = dict[str, tuple[float, ...]]
"""Step -> seconds of each repeat."""

GENERATOR, STUDENT, TEACH = "generator step", "student step", "teacher's answers"
LOADED, EVALUATION = "student step with batch", "evaluation"


def measure(
    asked: Question,
    found: Plugins,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 1,
) -> Speed:
    """Measure all forms of all steps that there are.

    ``threads``: of torch on the CPU. The forms follow each other, so that a loader's processes disturb no other form;
    ours, then ours in fp32, are the last. The peak is measured before and after them. Raises ``UserError`` for an
    unknown method or model, a device that isn't there, sizes that are too small, and for a method that can't do such a
    task.
    """
    _check(asked)
    where = resolve_device(device)
    prepare(where)
    torch.set_num_threads(threads)
    chosen = resolve_precision(precision, where, asked.side)
    seed_everything(0)
    with temporary_home():
        bench = Bench(asked, where, chosen, threads, found)
        before = peak.measure(where, chosen)
        memory: dict[str, int] = {}
        others: dict[str, Seconds] = {}
        works, png = None, None
        if asked.method == METHOD:
            others, png, works = _other_forms(bench, memory)
        set_threads(threads)  # what a run sets for its whole process begins here, after the other forms
        ours = _in_form("ours", memory, where, lambda: _ours(bench))
        if chosen != "fp32":  # after ours, whose peak would hold what fp32 frees and the process keeps
            others["exact"] = _in_form("fp32", memory, where, lambda: _exact(asked, where, threads, found))
        machine = peak.best_of(before, peak.measure(where, chosen))
        return Speed(
            method=asked.method,
            config=bench.config.model_dump(mode="json"),
            pair=asked.pair,
            batch=asked.batch,
            synthesis_batch=asked.synthesis_batch,
            image_shape=asked.image_shape,
            classes=asked.classes,
            precision=chosen,
            steps=asked.steps,
            repeat=asked.repeat,
            rows=_rows(bench, ours, others, works or _work(bench, None), machine),
            png_seconds=png,
            machine=machine,
            epoch=_epoch(bench),
            peak_memory=memory,
            profiles=_profiles(bench),
            hardware=hardware(where, 1),
            software=record.software(),
            git=record.git_state(),
            measured=record.now(),
        )


def _check(asked: Question) -> None:
    least = {"batch": 2, "synthesis_batch": 2, "side": 8, "classes": 2, "channels": 1, "steps": 1, "repeat": 1}
    for name, limit in least.items():
        value = getattr(asked, name)
        if value < limit:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {limit}")
    if asked.channels not in (1, 3):
        raise UserError(f"--channels {asked.channels}: expected 1 or 3, as in image files")


def _other_forms(bench: Bench, memory: dict[str, int]) -> tuple[dict[str, Seconds], float, dict[str, Work]]:
    """Both other forms, the seconds of writing a batch, and the work in the steps.

    Their weights are gone when this returns: what they take must not count in the peak of our own form.
    """
    plain = Plain(bench.config, bench.schedule, bench.task, *bench.fresh_models())
    seconds = {"plain": _in_form("plain", memory, bench.device, lambda: _plain(bench, plain))}
    seconds["released"], png = _in_form("released", memory, bench.device, lambda: _released(bench, plain))
    return seconds, png, _work(bench, plain)


def _exact(asked: Question, device: torch.device, threads: int, found: Plugins) -> Seconds:
    """The project's steps in fp32: the one other form that every method has."""
    return _ours(Bench(asked, device, "fp32", threads, found))


def _ours(bench: Bench) -> Seconds:
    """The project's steps, through the runner. Its clock tells the drawing of a batch from the step itself."""
    asked, device = bench.asked, bench.device
    found: Seconds = {}
    if bench.generated:
        found[GENERATOR] = per(repeated(bench.synthesis, device, asked.repeat), bench.generator_steps)
    repeated(bench.distillation, device, 0)
    phases = [_phases(bench, bench.distillation) for _ in range(asked.repeat)]
    found[STUDENT] = per(tuple(phase["distillation"] for phase in phases), asked.steps)
    found[LOADED] = per(tuple(phase["distillation"] + phase["sampling"] for phase in phases), asked.steps)
    found[TEACH] = repeated(bench.teach, device, asked.repeat)
    found[EVALUATION] = repeated(bench.evaluation, device, asked.repeat)
    return found


def _plain(bench: Bench, plain: Plain) -> Seconds:
    device, steps, repeat = bench.device, bench.asked.steps, bench.asked.repeat
    images = bench.student_images.float().contiguous()
    return {
        GENERATOR: per(repeated(lambda: plain.synthesize(keep_on_device), device, repeat), steps),
        STUDENT: per(repeated(_times(steps, lambda: plain.student_step(images)), device, repeat), steps),
        TEACH: repeated(lambda: plain.teach(images), device, repeat),
        EVALUATION: repeated(lambda: plain.evaluate(bench.held_out), device, repeat),
    }


def _released(bench: Bench, plain: Plain) -> tuple[Seconds, float]:
    """The steps, and the seconds of writing a batch; its share in a step is that of the method's own default."""
    device, steps, repeat = bench.device, bench.asked.steps, bench.asked.repeat
    with (
        tempfile.TemporaryDirectory() as folder,
        ReleasedManner(plain, Path(folder), bench.asked.batch) as released,
    ):
        images = released.synthesize()
        png = middle(repeated(lambda: released.write(images), device, repeat))
        share = png / type(bench.config)().generator_steps
        generator = per(repeated(released.synthesize, device, repeat), steps)
        loaded = per(repeated(_times(steps, released.student_step), device, repeat), steps)
        return {GENERATOR: tuple(value + share for value in generator), LOADED: loaded}, png


def _work(bench: Bench, plain: Plain | None) -> dict[str, Work]:
    """Of each step; counted in the plain form where there is one, in which no fast path is hidden from the counter."""
    steps = bench.asked.steps
    if plain is None:
        loaded = work_of(bench.distillation).per(steps)
        student = loaded.without(work_of(bench.sampling))  # some methods generate a student batch when it is asked for
        teach, evaluation = work_of(bench.teach), work_of(bench.evaluation)
        generator = work_of(bench.synthesis).per(bench.generator_steps) if bench.generated else Work(0, 0)
    else:
        images = bench.student_images.float().contiguous()
        loaded = student = work_of(lambda: plain.student_step(images))
        teach, evaluation = work_of(lambda: plain.teach(images)), work_of(lambda: plain.evaluate(bench.held_out))
        generator = work_of(lambda: plain.synthesize(keep_on_device)).per(steps)
    return {GENERATOR: generator, STUDENT: student, LOADED: loaded, TEACH: teach, EVALUATION: evaluation}


def _rows(
    bench: Bench, ours: Seconds, others: dict[str, Seconds], works: dict[str, Work], machine: Machine
) -> tuple[Row, ...]:
    rows_of_batch = bench.student_images.shape[0]
    images = {GENERATOR: bench.asked.synthesis_batch, EVALUATION: bench.held_out.shape[0]}
    made = []
    for name in (GENERATOR, STUDENT, LOADED, TEACH, EVALUATION):
        if name not in ours:
            continue
        count, work = images.get(name, rows_of_batch), works[name]
        cells = {
            form: cell(seconds[name], count, work, "fp32", machine) if name in seconds else None
            for form, seconds in others.items()
        }
        made.append(row(name, count, work, cell(ours[name], count, work, bench.precision, machine), **cells))
    return tuple(made)


def _profiles(bench: Bench) -> dict[str, tuple[Operator, ...]]:
    student = {STUDENT: profiling.operators(bench.distillation, bench.device, bench.asked.steps)}
    if not bench.generated:
        return student
    return {GENERATOR: profiling.operators(bench.synthesis, bench.device, bench.generator_steps)} | student


def _epoch(bench: Bench) -> dict[str, float]:
    """One epoch as the runner does it, of one batch and ``steps`` student steps, with its evaluation and checkpoint."""
    phases = dict.fromkeys(("synthesis", "sampling", "distillation", "evaluation"), 0.0)

    def epoch() -> None:
        bench.synthesis()
        bench.distillation()
        bench.evaluation()

    whole = seconds_of(lambda: phases.update(_phases(bench, epoch)), bench.device)
    kept = {name: seconds for name, seconds in phases.items() if seconds > 0}
    return kept | {
        "other": max(0.0, whole - sum(kept.values())),
        "checkpoint": seconds_of(bench.checkpoint, bench.device),
    }


def _phases(bench: Bench, call: Callable[[], object]) -> dict[str, float]:
    before = bench.seconds()
    call()
    return {name: seconds - before[name] for name, seconds in bench.seconds().items()}


def _times(count: int, call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(count):
            call()

    return calls


def _in_form(name: str, memory: dict[str, int], device: torch.device, call: Callable[[], T]) -> T:
    """Call, and note the peak memory where the system can begin a new one."""
    known = _forget_peak(device)
    result = call()
    if known:
        memory[name] = peak_memory(device)
    return result


def _forget_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak of resident memory becomes the present one
    except OSError:
        return False
    return True
