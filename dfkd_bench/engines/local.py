"""The default engine: one process a run, on this machine.

Processes are forked from a server that has imported torch (and has not touched CUDA), so that a run starts in a
fraction of a second and a crash, a leak or a full memory takes one run and not its neighbours. Teachers are trained
in processes of their own: the process of a method never opens a training file.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from dfkd_bench import plugins
from dfkd_bench.engines import server
from dfkd_bench.errors import UserError, disk_error
from dfkd_bench.job import Job, TeacherSpec
from dfkd_bench.paths import HOME_VARIABLE, home
from dfkd_bench.record import Record, read, record_path, write
from dfkd_bench.run import EpochDone, Place, failed
from dfkd_bench.suite import settings_table

ATTEMPTS = 2  # a process that is killed is started once more: it goes on from its checkpoint

State = Literal["started", "running", "done", "failed", "busy"]


@dataclass(frozen=True)
class Event:
    """What happened to one task. ``task``: an index into the list that was given."""

    task: int
    state: State
    epoch: int = 0
    epochs: int = 0
    accuracy: float | None = None
    reason: str = ""


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class TeacherTask:
    """One teacher to be trained."""

    dataset: str
    spec: TeacherSpec
    precision: Literal["fp32", "bf16"]


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: int
    slot: int
    error: str = ""
    finished: bool = False  # its work
    ended: bool = False


def run_jobs(jobs: Sequence[Job], place: Place, devices: Sequence[str], listen: Listener) -> list[Record | None]:
    """Run jobs, ``len(devices)`` at a time, each on a device of its own. None: another process has that run.

    Raises ``UserError`` as soon as a job needs something that the user must put right.
    """
    found = plugins.discover(place.plugin_files)  # now: a plugin's file may be changed, or be gone, when a run has died
    endings = _all(jobs, _run_child, place, devices, listen)
    records: list[Record | None] = []
    for job, ending in zip(jobs, endings, strict=True):
        path = record_path(place.output, job)
        if ending == "busy":
            records.append(None)
        elif path.is_file():
            records.append(read(path))
        else:  # the process died without a word, twice, or somebody took the record away
            reason = ending or "its record was removed while the command was at work"
            record = failed(job, found, reason)
            write(place.output, record)
            records.append(record)
    return records


def train_teachers(tasks: Sequence[TeacherTask], place: Place, devices: Sequence[str], listen: Listener) -> None:
    """Train teachers, each in a process of its own; a failure is a ``UserError``."""
    for task, ending in zip(tasks, _all(tasks, _teacher_child, place, devices, listen), strict=True):
        if ending:
            raise UserError(f"teacher {task.spec.model} for {task.dataset} could not be trained: {ending}")


def _all(
    tasks: Sequence[Any], child: Callable[..., None], place: Place, devices: Sequence[str], listen: Listener
) -> list[str]:
    """Work through ``tasks``; returns for each "" or how it ended otherwise ("busy", a reason)."""
    context = multiprocessing.get_context("forkserver")
    waiting = deque((index, 1) for index in range(len(tasks)))
    attempts = dict.fromkeys(range(len(tasks)), 0)
    free = list(range(len(devices)))
    endings = [""] * len(tasks)
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and free:
                index, attempt = waiting.popleft()
                slot = free.pop(0)
                attempts[index] = attempt
                here, there = context.Pipe(duplex=False)
                process = context.Process(
                    target=_in_environment,
                    args=(_environment(), child, tasks[index], replace(place, device=devices[slot]), there),
                    daemon=True,
                )
                server.start(devices)  # it may have been killed since the last one
                try:
                    process.start()
                except EOFError:
                    raise UserError(
                        "the server that runs are forked from has died (out of memory?): give the same command again"
                    ) from None
                except BaseException:  # Ctrl-C: the server may fork the run yet, which then finds that nobody listens
                    here.close()
                    raise
                finally:
                    there.close()
                running.append(_Worker(process, here, index, slot))
                listen(Event(index, "started"))
            _wait(running, listen)
            for worker in [worker for worker in running if worker.ended]:
                worker.process.join()
                running.remove(worker)
                free.append(worker.slot)
                code = worker.process.exitcode or 0
                if worker.error.startswith("user:"):
                    raise UserError(worker.error.removeprefix("user:"))
                if worker.error == "busy":
                    endings[worker.task] = "busy"
                    listen(Event(worker.task, "busy"))
                elif worker.error or not worker.finished:
                    reason = worker.error or _died(code)
                    if not worker.error and attempts[worker.task] < ATTEMPTS:
                        waiting.appendleft((worker.task, attempts[worker.task] + 1))
                        continue
                    endings[worker.task] = reason
                    listen(Event(worker.task, "failed", reason=reason))
                else:
                    listen(Event(worker.task, "done"))
    finally:
        _stop(running)
    return endings


def _wait(running: list[_Worker], listen: Listener) -> None:
    """Wait for the next message of any worker and pass it on."""
    ready = multiprocessing.connection.wait([worker.connection for worker in running], timeout=1.0)
    for worker in running:
        if worker.connection not in ready:
            continue
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):  # the process has ended, one way or another
            worker.ended = True
            continue
        if kind == "hello":
            continue
        if kind == "epoch":
            epoch, epochs, accuracy = value
            listen(Event(worker.task, "running", epoch, epochs, accuracy))
        elif kind == "finished":
            worker.finished = True
        else:
            worker.error = value


def _stop(running: list[_Worker]) -> None:
    """End what still runs: its state is in its folder."""
    for worker in running:
        worker.process.terminate()
    deadline = time.monotonic() + 5
    for worker in running:
        worker.process.join(max(0.1, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _died(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    if code == 0:
        return "the process ended before its work was done (SIGINT to it alone, or an exit in its code?)"
    return f"the process ended with exit code {code}"


# -- in the child ---------------------------------------------------------------------------------------------------

_asked_to_stop = threading.Event()


def _environment() -> dict[str, str]:
    """This project's variables as they are now: the fork server keeps those of its own start."""
    own = {name: value for name, value in os.environ.items() if name.startswith("DFKD_BENCH_")}
    return {**own, HOME_VARIABLE: str(home().resolve())}


def _in_environment(environment: dict[str, str], child: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(wanted) is not signal.SIG_IGN:  # what the shell has a background job ignore stays so
                signal.signal(wanted, _stopped)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # server.py blocks it
        child(*arguments)
    except KeyboardInterrupt:  # before its work, or after it
        pass


def _stopped(_signal: int, _frame: Any) -> None:
    """Ctrl-C, and SIGTERM likewise: the run gives its lease back, so that whoever takes it up need not wait.

    Only the first counts: after Ctrl-C, or a batch system's SIGTERM to all processes, the parent sends another. Python
    drops an exception that is raised while it destroys an object, so the next report to the parent raises it again.
    """
    _asked_to_stop.set()
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, lambda *_: None)  # not SIG_IGN: Python complains of one that has come already
    raise KeyboardInterrupt


def _tell(connection: Connection, message: tuple[str, Any]) -> None:
    """Report to the parent. If it is gone, the run stops as by Ctrl-C, to be taken up again."""
    if _asked_to_stop.is_set():
        raise KeyboardInterrupt
    try:
        connection.send(message)
    except OSError:
        raise KeyboardInterrupt from None


def _run_child(job: Job, place: Place, connection: Connection) -> None:
    from dfkd_bench.lease import Busy
    from dfkd_bench.run import run

    def report(done: EpochDone) -> None:
        _tell(connection, ("epoch", (done.epoch, done.epochs, done.accuracy)))

    def work() -> None:
        try:
            record = run(job, place, report)
        except Busy:
            _tell(connection, ("error", "busy"))
            return
        if record.status == "failed":
            _tell(connection, ("error", record.reason or "failed"))

    _guarded(work, connection)


def _teacher_child(task: TeacherTask, place: Place, connection: Connection) -> None:
    from dfkd_bench import data, teachers
    from dfkd_bench.compute import Compute, prepare, resolve_device, set_threads

    def work() -> None:
        set_threads(place.threads)
        found = plugins.discover(place.plugin_files)
        dataset = data.dataset(task.dataset, place.data_root, found.datasets)
        compute = Compute(resolve_device(place.device), task.precision)
        prepare(compute.device, place.deterministic)
        teachers.train(
            dataset,
            task.spec,
            compute,
            place.data_root,
            found.models,
            lambda progress: _tell(connection, ("epoch", (progress.epoch, progress.epochs, None))),
        )

    _guarded(work, connection)


def _guarded(work: Callable[[], None], connection: Connection) -> None:
    """Nothing that goes wrong in a child may print a traceback between the parent's progress bars."""
    try:
        _tell(connection, ("hello", None))  # a run that was forked after Ctrl-C ends here
        work()
        _tell(connection, ("finished", None))
    except UserError as error:
        _tell(connection, ("error", f"user:{error}"))
    except KeyboardInterrupt:
        pass  # by Ctrl-C, or because nobody listens any more
    except Exception as error:
        problem = disk_error(error) if isinstance(error, OSError) else None
        if problem:
            _tell(connection, ("error", f"user:{problem}"))
            return
        _tell(connection, ("error", f"{type(error).__name__}: {error}"))
    finally:
        connection.close()


def default_devices(device: str, workers: int | None, jobs: Sequence[Job]) -> tuple[list[str], int]:
    """Devices of the slots, and threads a process.

    GPUs: one slot each (all of them for ``auto`` and ``cuda``). CPU: ``smoke`` jobs are small nets that gain little
    from a second thread (24.5 -> 17.8 ms a step on digits), so each gets one thread and there are as many at a time as
    there are cores; with one thread the numbers do not depend on the machine's core count, either. Other jobs run one
    at a time on all cores.
    """
    import torch

    from dfkd_bench.compute import cores_at_hand, resolve_device

    resolved, cores = resolve_device(device), cores_at_hand()
    if resolved.type == "cuda":
        indices = range(torch.cuda.device_count()) if device in ("auto", "cuda") else [resolved.index]
        slots = [f"cuda:{index}" for index in indices]
        if workers is not None:
            slots = [slots[number % len(slots)] for number in range(workers)]
        return slots, max(1, cores // len(slots))
    small = all(settings_table(job.protocol, job.dataset) == "smoke" for job in jobs)
    count = workers or (max(1, min(cores, len(jobs))) if small else 1)
    return ["cpu"] * count, 1 if small else max(1, cores // count)


def output_is_writable(output: Path) -> None:
    """Fail before the work, not after it."""
    import tempfile

    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise UserError(f"can't write to --output {output}: {error.strerror or error}") from None
