"""Forms in turn, each in a process of its own.

The speed of a virtual machine drifts by a tenth within minutes, and forms that are timed one after the other differ by
that, too. So on a CPU each form times one repeat, then the next form does, and so on round after round: a ratio is
taken within a round. A process for each keeps their memory, their threads and their allocators apart. On a GPU, whose
memory may not hold all forms, each form has all its repeats before the next one.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from dfkd_bench.errors import UserError
from dfkd_bench.speed.forms import Facts, Form, Order, Seconds

T = TypeVar("T")

_here = threading.local()
"""Of the process that a form lives in: the form."""


class Apart:
    """A form in a process of its own; used in a ``with``, which ends it."""

    def __init__(self, order: Order) -> None:
        self.name = order.name
        self._order = order
        self._process = new_process()
        self._process.submit(_wake)  # all processes import torch at once, before any of them makes its form

    def __enter__(self) -> Apart:
        self._ask(_begin, self._order)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.shutdown(wait=True, cancel_futures=True)

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


def _wake() -> None:
    """Nothing: to find it the process has imported this file."""


def _begin(order: Order) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's
    _here.form = order.make()


def _repeat() -> Seconds:
    form: Form = _here.form
    return form.repeat()


def _facts() -> Facts:
    form: Form = _here.form
    return form.facts()
