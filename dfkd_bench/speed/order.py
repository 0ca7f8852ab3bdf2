"""What another process is told to make: one of the forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dfkd_bench import plugins
from dfkd_bench.checkpoint import seed_everything
from dfkd_bench.compute import prepare
from dfkd_bench.job import Precision
from dfkd_bench.speed.bench import Question
from dfkd_bench.speed.forms import Form, Ours
from dfkd_bench.speed.ordinary import OrdinaryForm, OrdinaryReleasedForm
from dfkd_bench.speed.plain import METHOD
from dfkd_bench.speed.written import PlainForm, ReleasedForm


@dataclass(frozen=True)
class Order:
    """What another process is told to make: one of the forms."""

    name: str
    asked: Question
    device: torch.device
    precision: Precision  # of ours
    threads: int
    plugin_files: tuple[Path, ...]

    def make(self) -> Form:
        """Build it and warm it up. Raises ``UserError`` for a method that can't do such a task."""
        prepare(self.device)
        seed_everything(0)
        found = plugins.discover(self.plugin_files)
        form: Form
        if self.name in ("ours", "exact"):
            precision = self.precision if self.name == "ours" else "fp32"
            form = Ours(self.asked, self.device, precision, self.threads, found)
        else:
            written = {"plain": PlainForm, "released": ReleasedForm}
            any_method = {"plain": OrdinaryForm, "released": OrdinaryReleasedForm}
            kinds: Mapping[str, Callable[..., Form]] = written if self.asked.method == METHOD else any_method
            form = kinds[self.name](self.asked, self.device, self.threads, found)
            torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it by itself; a run turns it off
        form.warm_up()
        return form
