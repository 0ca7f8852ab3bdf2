"""Forms in turn, each in a process of its own.

The speed of a virtual machine drifts by a tenth within minutes, and forms that are timed one after the other differ by
that, too. So on a CPU each form times one repeat, then the next form does, and so on round after round: a ratio is
taken within a round. A process for each keeps their memory, their threads and their allocators apart. On a GPU, whose
memory may not hold all forms, each form has all its repeats before the next one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import resource_tracker
from types import TracebackType
from typing import TypeVar

from dfkd_bench.errors import UserError
from dfkd_bench.speed.forms import Facts, Form, Seconds
from dfkd_bench.speed.order import Order

T = TypeVar("T")

_here = threading.local()
"""Of the process that a form lives in: the form."""


class Apart:
    """A form in its own process, which starts at once. ``begin`` builds the form, the ``with`` ends the process."""

    def __init__(self, order: Order) -> None:
        self.name = order.name
        self._order = order
        self._process = new_process()
        with _without_ctrl_c():
            self._process.submit(_wake)  # all processes import torch at once, before any of them makes its form

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:  # Ctrl-C, say: nobody waits for the end of a repeat
            for process in list((getattr(self._process, "_processes", None) or {}).values()):
                process.terminate()
        self._process.shutdown(wait=True, cancel_futures=True)

    def begin(self) -> None:
        """Build the form and warm it up."""
        self._ask(_begin, self._order)

    def repeat(self) -> Seconds:
        """One repeat of its steps."""
        return self._ask(_repeat)

    def facts(self) -> Facts:
        """All else; the last thing that it is asked."""
        return self._ask(_facts)

    def _ask(self, call: Callable[..., T], *arguments: Order) -> T:
        try:
            return self._process.submit(call, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process that timed '{self.name}' was killed, for want of memory perhaps: take a smaller --batch "
                "and --synthesis-batch"
            ) from None


def take_turns(
    orders: Sequence[Order], repeat: int, between: Callable[[], None]
) -> Iterator[tuple[str, list[Seconds], Facts]]:
    """Time all forms, ``repeat`` times each; call ``between`` after every repeat of any of them. Name by name."""
    together = all(order.device.type == "cpu" for order in orders)
    groups = [list(orders)] if together else [[order] for order in orders]
    for group in groups:
        with ExitStack() as stack:
            forms = [stack.enter_context(Apart(order)) for order in group]
            for form in forms:
                form.begin()
            rounds: dict[str, list[Seconds]] = {form.name: [] for form in forms}
            for _ in range(repeat):
                for form in forms:
                    rounds[form.name].append(form.repeat())
                    between()
            for form in forms:
                yield form.name, rounds[form.name], form.facts()


def new_process() -> Executor:
    """One process, started anew: a copy of this one would have its memory, and no GPU."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits. A process that is started inside does not get it either: it would print a traceback."""
    resource_tracker.ensure_running()  # starting a process does it, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the form's process ------------------------------------------------------------------------------------------


def _wake() -> None:
    """To find it the process has imported this file. It ends with its parent, and Ctrl-C is the parent's."""
    parent = multiprocessing.parent_process()
    if parent is None or threading.current_thread() is not threading.main_thread():
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=watch, daemon=True, name="parent").start()


def _begin(order: Order) -> None:
    _here.form = order.make()


def _repeat() -> Seconds:
    form: Form = _here.form
    return form.repeat()


def _facts() -> Facts:
    form: Form = _here.form
    return form.facts()
