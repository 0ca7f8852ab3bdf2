"""Label-text embeddings, float32 [K, d], of class names and a prompt: shipped, kept, or asked of an encoder once.

An encoder is named by a string (``encoders/`` has a file for each):

====================  ==================================================================================================
``onehot[:WIDTH]``    the identity, [K, K]; wider: with zeros behind it
``random[:WIDTH]``    N(0, 1) of a fixed seed, [K, 512] unless a width is given: the same for every run
``sbert[:MODEL]``     sentence-transformers; a model's name or ./FOLDER (default all-MiniLM-L6-v2, d = 384)
``clip[:ARCH/W]``     open_clip's text features, not normalised as in NAYER; W is a tag or a checkpoint
                      (default ViT-B-32/openai, d = 512)
``doc2vec[:MODEL]``   gensim; a saved model, or ``corpus=FILE`` to be trained on (default: WordNet's glosses, d = 100)
``file:PATH``         a matrix [K, d] in a .npy or .safetensors file
====================  ==================================================================================================

For the built-in data sets and ``PROMPTS`` the matrices of ``sbert`` and ``doc2vec`` are shipped with the package.
Others are encoded once by ``ensure`` and kept in ``$DFKD_BENCH_HOME/embeddings``; ``load`` only reads. A file carries
the hash of the rendered prompts it was made of and is used for no others. Text models are imported only where one is
needed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dfkd_bench.encoders import (
    Encoder,
    RowEncoder,
    Rows,
    TextEncoder,
    build_encoder,
    encoder_names,
    first_line,
)
from dfkd_bench.errors import UserError
from dfkd_bench.paths import HOME_VARIABLE, home
from dfkd_bench.prompts import PROMPTS, names_classes, render, template

__all__ = [
    "PROMPTS",
    "LabelEmbeddings",
    "Origin",
    "encode",
    "encoder_names",
    "ensure",
    "is_at_hand",
    "load",
    "pack",
    "render",
    "store",
    "template",
]

_SHIPPED = "dfkd_bench.embeddings"
_INDEX_FILE = "index"  # its prompts have no names in them: they serve every data set

log = logging.getLogger(__name__)

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class LabelEmbeddings:
    """One row a class, and where the rows come from."""

    matrix: Rows  # [K, d], finite
    encoder: str  # its name, without an argument
    model: str
    revision: str  # sha256 of the model's weights, or of the file; what fixes the numbers of a computed matrix
    prompt: str  # the template; empty where no text is encoded
    path: str | None  # the file it was read from; "shipped" for the package's own; None: computed

    @property
    def sha256(self) -> str:
        """Of the matrix's bytes (float32, row by row)."""
        return _matrix_sha256(self.matrix)

    def facts(self) -> dict[str, str]:
        """What a record keeps: no path, so that it is the same on every machine."""
        names = ("encoder", "model", "revision", "prompt", "sha256")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Origin:
    """The text model that encoded something."""

    encoder: str
    model: str
    revision: str
    libraries: Mapping[str, str]  # versions


def load(
    dataset: str, class_names: Sequence[str], encoder: str, prompt: str, extra: Mapping[str, Any] | None = None
) -> LabelEmbeddings:
    """The embeddings of ``class_names``, shipped, kept, from a file or computed. Imports no text model.

    ``extra`` maps names of encoders from plugins to their classes. ``UserError``: they would have to be encoded first,
    a kept file is damaged, or an argument is wrong.
    """
    source = build_encoder(encoder, extra)
    try:
        found = _find(dataset, class_names, source, prompt)
    except _DamagedError as error:
        raise UserError(f"{error}: delete it, then it is encoded again") from None
    if found is None:
        assert isinstance(source, TextEncoder)
        raise UserError(
            f"label-text embeddings of '{dataset}' by '{encoder}' for the prompt '{prompt}' are not encoded yet: that "
            f"takes {source.title} once. {source.ways_out}"
        )
    return found


def ensure(
    dataset: str, class_names: Sequence[str], encoder: str, prompt: str, extra: Mapping[str, Any] | None = None
) -> LabelEmbeddings:
    """``load``, or encode once with the text model and keep the result; a damaged kept file is made again.

    ``UserError``: the text model can't be had, or the result can't be written.
    """
    source = build_encoder(encoder, extra)
    try:
        found = _find(dataset, class_names, source, prompt)
    except _DamagedError as error:
        log.warning("%s: it is made again", error)
        found = None
    if found is None:
        assert isinstance(source, TextEncoder)
        texts = render(prompt, class_names)
        matrix, origin = encode(source, texts)
        store(_kept_path(source, template(prompt), texts), origin, {template(prompt): (texts, matrix)})
        found = _find(dataset, class_names, source, prompt)
        assert found is not None
    return found


def is_at_hand(
    dataset: str, class_names: Sequence[str], encoder: str, prompt: str, extra: Mapping[str, Any] | None = None
) -> bool:
    """Whether ``load`` has them; else a text model must be asked first. ``UserError``: a wrong argument."""
    try:
        return _find(dataset, class_names, build_encoder(encoder, extra), prompt) is not None
    except _DamagedError:  # it is made again
        return False


def encode(source: TextEncoder, texts: Sequence[str]) -> tuple[Rows, Origin]:
    """Ask the text model now: float32 [n, d] of ``texts``.

    ``UserError``: the model can't be had; without a connection that takes no longer than importing the library.
    """
    try:
        rows, revision = source.encode(texts)
        matrix = np.ascontiguousarray(rows, dtype=np.float32)
        if matrix.ndim != 2 or len(matrix) != len(texts) or not matrix.size or not np.isfinite(matrix).all():
            raise ValueError(f"it gives {list(matrix.shape)}, expected finite numbers [{len(texts)}, d]")
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen types, their own and others'
        raise UserError(f"can't have {source.title} ({first_line(error)}). {source.ways_out}") from error
    versions = {name: importlib.metadata.version(name) for name in source.libraries}
    return matrix, Origin(source.name, source.model, revision, versions)


# --- Matrices at hand -------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A file of embeddings is not what its metadata say; the message names it."""


def _find(dataset: str, class_names: Sequence[str], source: Encoder, prompt: str) -> LabelEmbeddings | None:
    texts = render(prompt, class_names)  # first, since a wrong prompt is wrong with every encoder
    if isinstance(source, RowEncoder):
        matrix = source.rows(len(texts))
        return LabelEmbeddings(matrix, source.name, source.model, source.revision, "", source.path)
    assert isinstance(source, TextEncoder)
    shipped = _shipped(dataset, source, template(prompt), texts)
    if shipped is not None:
        return shipped
    kept = _kept_path(source, template(prompt), texts)
    if not kept.exists():
        return None
    found = _read(kept, template(prompt), texts)
    if found is None:
        raise _DamagedError(f"{kept} holds the embeddings of other prompts")
    return found


def _shipped(dataset: str, source: TextEncoder, text: str, texts: list[str]) -> LabelEmbeddings | None:
    if source.weights() is not None or not dataset.isidentifier():
        return None
    # SBERT's files came first and have no encoder in their names
    for name in (f"{dataset}.{source.name}", f"{_INDEX_FILE}.{source.name}", dataset, _INDEX_FILE):
        resource = importlib.resources.files(_SHIPPED) / f"{name}.safetensors"
        if not resource.is_file():
            continue
        with importlib.resources.as_file(resource) as path:
            try:
                found = _read(path, text, texts)
            except _DamagedError as error:
                raise UserError(f"{error}: it came with dfkd-bench, install that again") from None
        if found is not None and (found.encoder, found.model) == (source.name, source.model):
            return LabelEmbeddings(found.matrix, found.encoder, found.model, found.revision, text, "shipped")
    return None


def _kept_path(source: TextEncoder, text: str, texts: list[str]) -> Path:
    version = [source.version] if source.version != 1 else []
    key = json.dumps([source.name, source.model, source.weights(), text, texts, *version])
    return home() / "embeddings" / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


# --- Files: one tensor a prompt, named by its template ----------------------------------------------------------------


def store(path: Path, origin: Origin, tables: Mapping[str, tuple[Sequence[str], Matrix]]) -> None:
    """Write ``{template: (rendered prompts, [K, d])}`` atomically, in the type of the matrices.

    ``UserError``: the folder can't be written.
    """
    facts = {
        text: {"texts": _texts_sha256(texts), "matrix": _matrix_sha256(matrix)}
        for text, (texts, matrix) in tables.items()
    }
    metadata = {
        "encoder": origin.encoder,
        "model": origin.model,
        "revision": origin.revision,
        "libraries": json.dumps(dict(origin.libraries)),
        "sha256": json.dumps(facts),
    }
    content = pack({text: np.ascontiguousarray(matrix) for text, (_, matrix) in tables.items()}, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)
                file.close()
                os.chmod(file.name, 0o644)  # temporary files are their owner's only
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"can't write {path} ({first_line(error)}): ${HOME_VARIABLE} names another folder") from None


def pack(matrices: Mapping[str, Matrix], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the same input gives the same bytes (the library alone has metadata in a random order)."""
    content = save(dict(matrices), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers behind it stay aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def _read(path: Path, text: str, texts: list[str]) -> LabelEmbeddings | None:
    """The rows of ``texts``; None if the file doesn't have them."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if text not in file.keys():  # noqa: SIM118 (a file is no dict)
                return None
            matrix = file.get_tensor(text).astype(np.float32)
        facts = json.loads(metadata["sha256"])[text]
        origin = (metadata["encoder"], metadata["model"], metadata["revision"])
        sound = matrix.ndim == 2 and bool(np.isfinite(matrix).all()) and facts["matrix"] == _matrix_sha256(matrix)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise _DamagedError(f"{path} is damaged ({first_line(error)})") from None
    if not sound:
        raise _DamagedError(f"{path} is damaged (its numbers are not those that were written)")
    made_of = texts if names_classes(text) else render(text, [""] * len(matrix))  # the first K rows serve K classes
    if facts["texts"] != _texts_sha256(made_of) or len(matrix) < len(texts):
        return None
    return LabelEmbeddings(np.ascontiguousarray(matrix[: len(texts)]), *origin, text, str(path))


def _texts_sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _matrix_sha256(matrix: Matrix) -> str:
    return hashlib.sha256(np.ascontiguousarray(matrix, dtype="<f4").tobytes()).hexdigest()
