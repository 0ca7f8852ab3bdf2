"""``sbert[:MODEL]``: sentence-transformers; a model's name or a folder (default all-MiniLM-L6-v2, d = 384).

A folder begins with a path's sign, as in ``sbert:./FOLDER``: a name means the same model in every working directory.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dfkd_bench.encoders import NO_MODEL_NEEDED, Rows, TextEncoder, file_sha256
from dfkd_bench.encoders._hub import short_wait, state_sha256
from dfkd_bench.errors import UserError
from dfkd_bench.paths import expanded

DEFAULT_MODEL = "all-MiniLM-L6-v2"

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Sbert(TextEncoder):
    """The default model's embeddings of the built-in data sets are shipped."""

    expected: ClassVar[str] = f"'sbert:./FOLDER' or a model's name, as in 'sbert:{DEFAULT_MODEL}'"
    libraries: ClassVar[tuple[str, ...]] = ("sentence-transformers", "transformers", "torch")

    def __init__(self, name: str, argument: str = "") -> None:
        super().__init__(name, argument)
        self.source = (argument or DEFAULT_MODEL).removeprefix("sentence-transformers/")
        folder = expanded(self.source)
        self.folder = folder if self.source.startswith((".", "~")) or folder.is_absolute() else None
        if self.folder is None and self.source.count("/") > 1:
            raise UserError(f"text encoder '{self.spec}' names no model, and folders begin with ./: './{self.source}'")
        if self.folder is not None and not folder.is_dir():
            raise UserError(f"text encoder '{self.spec}': there is no folder {folder}; expected {self.expected}")

    @property
    def model(self) -> str:
        return self.source if self.folder is None else self.folder.resolve().name

    @property
    def title(self) -> str:
        return f"the sentence-transformers model '{self.source}'"

    @property
    def ways_out(self) -> str:
        return (
            "A folder that holds it is given by `-s METHOD.encoder=sbert:./FOLDER`, a matrix [K, d] by "
            f"`-s METHOD.encoder=file:PATH`. {NO_MODEL_NEEDED}"
        )

    def weights(self) -> str | None:
        """The tokenizer and the pooling fix the rows as much as the weights do, so all files of a folder count."""
        if self.folder is None:
            return None
        return ",".join(filter(None, (f"sha256:{_weights_sha256(self.folder)}", _others_sha256(self.folder))))

    def encode(self, texts: Sequence[str]) -> tuple[Rows, str]:
        if self.folder is None and Path(self.source).exists():  # the library would take it for the model
            raise UserError(
                f"'{self.source}' is a model's name and a folder here: write sbert:./{self.source}, or rename it"
            )
        revision = None if self.folder is None else f"sha256:{_weights_sha256(self.folder)}"
        with short_wait(online=self.folder is None):
            rows = self._loaded.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
            revision = revision or f"state-sha256:{state_sha256(self._loaded)}"
        return np.asarray(rows, dtype=np.float32), revision

    @functools.cached_property
    def _loaded(self) -> Any:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(self.folder or self.source), device="cpu")


def _weights_sha256(folder: Path) -> str:
    """Of the one file of weights in a model's folder, or of the hashes of several."""
    preferred = {file.parent: file for name in reversed(_WEIGHTS) for file in sorted(folder.rglob(name))}
    hashes = [file_sha256(file) for _, file in sorted(preferred.items())]
    if not hashes:
        raise UserError(f"{folder} holds no text model: expected one of {', '.join(_WEIGHTS)} in it")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _others_sha256(folder: Path) -> str:
    """Of the names and contents of all files that are neither weights nor pages to read; "" if there are none."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in _WEIGHTS and file.suffix != ".md" and not file.name.startswith(".")
    ]
    lines = "\n".join(f"{file.relative_to(folder).as_posix()} {file_sha256(file)}" for file in files)
    return f"files-sha256:{hashlib.sha256(lines.encode()).hexdigest()}" if files else ""
