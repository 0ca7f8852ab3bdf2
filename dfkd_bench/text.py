"""Class names -> prompts -> label-text embeddings, float32 [K, d].

An encoder is named by a string:

===================  ===================================================================================================
``onehot``           the identity, [K, K]
``random[:WIDTH]``   N(0, 1) of a fixed seed, [K, 512] unless a width is given: the same for every run
``sbert[:MODEL]``    sentence-transformers; a model's name or a folder (default all-MiniLM-L6-v2, d = 384)
``clip[:ARCH/W]``    open_clip's text features, not normalised as in NAYER; W is a tag or a checkpoint
                     (default ViT-B-32/openai, d = 512)
``file:PATH``        a matrix [K, d] in a .npy or .safetensors file
===================  ===================================================================================================

For the built-in data sets and ``PROMPTS`` the matrices of ``sbert`` are shipped with the package. Others are encoded
once by ``ensure`` and kept in ``$DFKD_BENCH_HOME/embeddings``; ``load`` only reads. A file carries the hash of the
rendered prompts it was made of and is used for no others. Text models are imported only where one is needed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dfkd_bench.class_names import clean
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.paths import HOME_VARIABLE, home

PROMPTS = {
    "P1": "{name}",
    "P2": "a photo of a {name}",
    "P3": "a class of {index}",
    "nayer": "a image of {name}",  # sic: the prompt of NAYER's released code
}
"""Prompts that have a name of their own (P1 to P3: NAYER's ablation)."""

DEFAULT_PROMPT = PROMPTS["P2"]
RANDOM_WIDTH = 512  # of CLIP ViT-B/32's text features, so that random embeddings compare with NAYER's
RANDOM_SEED = 0
SBERT_MODEL = "all-MiniLM-L6-v2"
CLIP_MODEL = "ViT-B-32/openai"
PROBE_SECONDS = 5.0  # how long the model hub may take to answer before it counts as out of reach
BATCH = 256  # texts that CLIP encodes at a time

_FIELDS = ("name", "index")
_SHIPPED = "dfkd_bench.embeddings"
_INDEX_FILE = "index"  # its prompts have no names in them: they serve every data set
_CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

log = logging.getLogger(__name__)

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class LabelEmbeddings:
    """One row a class, and where the rows come from."""

    matrix: NDArray[np.float32]  # [K, d], finite
    encoder: str  # one of ``encoder_names()``
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
class TextModel:
    """A text model that encoded something."""

    encoder: str
    model: str
    revision: str
    libraries: Mapping[str, str]  # versions


def encoder_names() -> tuple[str, ...]:
    """The encoders, without their arguments."""
    return ("clip", "file", "onehot", "random", "sbert")


def load(dataset: str, class_names: Sequence[str], encoder: str, prompt: str) -> LabelEmbeddings:
    """The embeddings of ``class_names``, shipped, kept, from a file or computed. Imports no text encoder.

    ``UserError``: they would have to be encoded first, a kept file is damaged, or an argument is wrong.
    """
    source = _source(encoder)
    try:
        found = _find(dataset, class_names, source, prompt)
    except _DamagedError as error:
        raise UserError(f"{error}: delete it, then it is encoded again") from None
    if found is None:
        raise UserError(
            f"label-text embeddings of '{dataset}' by '{encoder}' for the prompt '{prompt}' are not encoded yet: that "
            f"takes {source.title} once. {source.ways_out}"
        )
    return found


def ensure(dataset: str, class_names: Sequence[str], encoder: str, prompt: str) -> LabelEmbeddings:
    """``load``, or encode once with the text model and keep the result; a damaged kept file is made again.

    ``UserError``: the text model can't be had, or the result can't be written.
    """
    source = _source(encoder)
    try:
        found = _find(dataset, class_names, source, prompt)
    except _DamagedError as error:
        log.warning("%s: it is made again", error)
        found = None
    if found is None:
        texts = render(prompt, class_names)
        matrix, model = encode(encoder, texts)
        store(_kept_path(source, template(prompt), texts), model, {template(prompt): (texts, matrix)})
        found = _find(dataset, class_names, source, prompt)
        assert found is not None
    return found


# --- Prompts ----------------------------------------------------------------------------------------------------------


def template(prompt: str) -> str:
    """The template of a prompt: itself, or what a name of ``PROMPTS`` stands for.

    ``UserError``: unknown fields, or no field at all, which would make all classes one.
    """
    text = PROMPTS.get(prompt, prompt)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise UserError(f"prompt '{prompt}' is no template ({error}): fields are {{name}} and {{index}}") from None
    for field in fields:
        if field not in _FIELDS:
            raise unknown("field of the prompt", field, _FIELDS, f"The prompt was '{prompt}'")
    if not fields:
        raise UserError(
            f"prompt '{prompt}' has no field: expected {{name}} or {{index}} in it, or {', '.join(PROMPTS)}"
        )
    return text


def render(prompt: str, class_names: Sequence[str]) -> list[str]:
    """One text a class; ``{name}`` is in lower case with blanks for '_' and '-', ``{index}`` counts from 0.

    Classes of one name get the same text.

    >>> render("a photo of a {name}", ["Aquarium_fish"])
    ['a photo of a aquarium fish']
    """
    text = template(prompt)
    try:
        return [text.format(name=clean(name), index=index) for index, name in enumerate(class_names)]
    except (ValueError, LookupError) as error:  # a format that doesn't fit, as in {name:d}
        raise UserError(f"prompt '{prompt}' can't be filled in ({error}): write plain {{name}} or {{index}}") from None


# --- Encoder names ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """An encoder's name, taken apart."""

    encoder: str
    argument: str = ""  # a width, a path, a model's name, or CLIP's architecture and weights
    local: Path | None = None  # a model's folder or checkpoint on this machine
    title: str = ""  # the model, in an error's words
    ways_out: str = ""  # what a user without the model can do

    @property
    def model(self) -> str:
        if self.local is None:
            return self.argument
        name = self.local.resolve().name
        return name if self.encoder == "sbert" else f"{self.architecture}/{name}"

    @property
    def architecture(self) -> str:
        return self.argument.partition("/")[0]

    def local_revision(self) -> str | None:
        return None if self.local is None else "sha256:" + _weights_sha256(self.local)


def _source(encoder: str) -> _Source:
    name, colon, argument = encoder.partition(":")
    if name not in encoder_names():
        raise unknown("text encoder", name, encoder_names())
    if colon and not argument:
        raise UserError(f"text encoder '{encoder}' has nothing after the colon: expected {_EXPECTED[name]}")
    return _PARSERS[name](argument)


def _parse_onehot(argument: str) -> _Source:
    if argument:
        raise UserError(f"text encoder 'onehot:{argument}' is not one: 'onehot' is always as wide as there are classes")
    return _Source("onehot")


def _parse_random(argument: str) -> _Source:
    width = argument or str(RANDOM_WIDTH)
    if not (width.isascii() and width.isdigit() and 1 <= int(width) <= 65536):
        raise UserError(f"text encoder 'random:{argument}': expected a width from 1 to 65536, as in 'random:512'")
    return _Source("random", str(int(width)))


def _parse_file(argument: str) -> _Source:
    if not argument:
        raise UserError(f"text encoder 'file' names no file: expected {_EXPECTED['file']}")
    return _Source("file", argument, Path(argument).expanduser())


def _parse_sbert(argument: str) -> _Source:
    name = (argument or SBERT_MODEL).removeprefix("sentence-transformers/")
    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    means_folder = name.startswith((".", "/", "~")) or name.count("/") > 1
    if means_folder and not is_local:
        raise UserError(f"text encoder 'sbert:{argument}': there is no folder {folder}; expected {_EXPECTED['sbert']}")
    return _Source(
        "sbert",
        name,
        folder if is_local else None,
        f"the sentence-transformers model '{name}'",
        "A folder that holds it is given by `-s nayer.encoder=sbert:FOLDER`, a matrix [K, d] by "
        "`-s nayer.encoder=file:PATH`. No model is needed for `-s nayer.encoder=sbert` on built-in data sets with the "
        f"prompts {', '.join(PROMPTS)}, nor for onehot or random",
    )


def _parse_clip(argument: str) -> _Source:
    architecture, _, weights = (argument or CLIP_MODEL).partition("/")
    if not architecture or not weights:
        raise UserError(f"text encoder 'clip:{argument}': expected {_EXPECTED['clip']}")
    checkpoint = Path(weights).expanduser()
    is_local = checkpoint.is_file()
    means_file = "/" in weights or weights.startswith("~") or checkpoint.suffix in _CHECKPOINTS
    if means_file and not is_local:
        raise UserError(f"text encoder 'clip:{argument}': there is no file {checkpoint}; expected {_EXPECTED['clip']}")
    # OpenAI's weights want QuickGELU, which open_clip switches on by the tag only, not for a checkpoint by path
    file_architecture = f"{architecture}-quickgelu" if weights == "openai" else architecture
    return _Source(
        "clip",
        f"{architecture}/{weights}",
        checkpoint if is_local else None,
        f"CLIP's weights '{architecture}/{weights}' (not shipped)",
        f"A checkpoint on disk is given by `-s nayer.encoder=clip:{file_architecture}/CHECKPOINT`, a matrix [K, d] by "
        "`-s nayer.encoder=file:PATH`. `-s nayer.encoder=sbert` does without a model on built-in data sets, and so do "
        "onehot and random",
    )


_PARSERS: dict[str, Callable[[str], _Source]] = {
    "clip": _parse_clip,
    "file": _parse_file,
    "onehot": _parse_onehot,
    "random": _parse_random,
    "sbert": _parse_sbert,
}

_EXPECTED = {
    "clip": "'clip:ARCH/TAG' or 'clip:ARCH/CHECKPOINT', as in 'clip:ViT-B-32/openai'",
    "file": "'file:PATH' with a .npy or .safetensors file",
    "onehot": "'onehot'",
    "random": "'random:WIDTH'",
    "sbert": f"'sbert:FOLDER' or a model's name, as in 'sbert:{SBERT_MODEL}'",
}


# --- Matrices at hand -------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A file of embeddings is not what its metadata say; the message names it."""


def _find(dataset: str, class_names: Sequence[str], source: _Source, prompt: str) -> LabelEmbeddings | None:
    texts = render(prompt, class_names)  # first, since a wrong prompt is wrong with every encoder
    if source.encoder == "onehot":
        return LabelEmbeddings(np.eye(len(texts), dtype=np.float32), "onehot", "identity", "", "", None)
    if source.encoder == "random":
        return _random(len(texts), int(source.argument))
    if source.encoder == "file":
        return _from_file(source, len(texts))
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


def _random(classes: int, width: int) -> LabelEmbeddings:
    # Box-Muller on raw bits: numpy promises its bit generators' streams for ever, but not those of its samplers
    bits = np.random.PCG64(RANDOM_SEED).random_raw(2 * classes * width).reshape(classes, width, 2)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    matrix = np.sqrt(-2.0 * np.log(uniform[..., 0])) * np.cos(2.0 * np.pi * uniform[..., 1])
    return LabelEmbeddings(matrix.astype(np.float32), "random", "N(0, 1)", f"seed {RANDOM_SEED}", "", None)


def _from_file(source: _Source, classes: int) -> LabelEmbeddings:
    path = source.local
    assert path is not None
    if path.suffix not in (".npy", ".safetensors"):
        raise UserError(f"can't read embeddings from {path}: expected {_EXPECTED['file']}")
    try:
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
        else:
            with safe_open(path, framework="numpy") as file:
                (name,) = file.keys()
                matrix = file.get_tensor(name)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise UserError(f"can't read one matrix [{classes}, d] from {path}: {_reason(error)}") from None
    shape, numeric = list(matrix.shape), np.issubdtype(matrix.dtype, np.floating)
    if len(shape) != 2 or shape[0] != classes or shape[1] < 1 or not numeric:
        raise UserError(f"{path} holds {matrix.dtype} {shape}: expected floats [{classes}, d], one row for each class")
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        matrix = np.ascontiguousarray(matrix, dtype=np.float32)
    if not np.isfinite(matrix).all():
        raise UserError(f"{path} holds values that are not finite in float32: expected floats [{classes}, d]")
    return LabelEmbeddings(matrix, "file", path.name, f"sha256:{_file_sha256(path)}", "", str(path))


def _shipped(dataset: str, source: _Source, text: str, texts: list[str]) -> LabelEmbeddings | None:
    if source.local is not None or not dataset.isidentifier():
        return None
    for name in (dataset, _INDEX_FILE):
        resource = importlib.resources.files(_SHIPPED) / f"{name}.safetensors"
        if not resource.is_file():
            continue
        with importlib.resources.as_file(resource) as path:
            try:
                found = _read(path, text, texts)
            except _DamagedError as error:
                raise UserError(f"{error}: it came with dfkd-bench, install that again") from None
        if found is not None and (found.encoder, found.model) == (source.encoder, source.model):
            return LabelEmbeddings(found.matrix, found.encoder, found.model, found.revision, text, "shipped")
    return None


def _kept_path(source: _Source, text: str, texts: list[str]) -> Path:
    key = json.dumps([source.encoder, source.model, source.local_revision(), text, texts])
    return home() / "embeddings" / f"{source.encoder}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


# --- Files: one tensor a prompt, named by its template ----------------------------------------------------------------


def store(path: Path, model: TextModel, tables: Mapping[str, tuple[Sequence[str], Matrix]]) -> None:
    """Write ``{template: (rendered prompts, [K, d])}`` atomically, in the type of the matrices.

    ``UserError``: the folder can't be written.
    """
    facts = {
        text: {"texts": _texts_sha256(texts), "matrix": _matrix_sha256(matrix)}
        for text, (texts, matrix) in tables.items()
    }
    metadata = {
        "encoder": model.encoder,
        "model": model.model,
        "revision": model.revision,
        "libraries": json.dumps(dict(model.libraries)),
        "sha256": json.dumps(facts),
    }
    content = save({text: np.ascontiguousarray(matrix) for text, (_, matrix) in tables.items()}, metadata)
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
        raise UserError(f"can't write {path} ({_reason(error)}): ${HOME_VARIABLE} names another folder") from None


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
        raise _DamagedError(f"{path} is damaged ({_reason(error)})") from None
    if not sound:
        raise _DamagedError(f"{path} is damaged (its numbers are not those that were written)")
    made_of = texts
    if all(field != "name" for _, field, _, _ in string.Formatter().parse(text)):
        made_of = render(text, [""] * len(matrix))  # the first K rows serve K classes
    if facts["texts"] != _texts_sha256(made_of) or len(matrix) < len(texts):
        return None
    return LabelEmbeddings(np.ascontiguousarray(matrix[: len(texts)]), *origin, text, str(path))


def _texts_sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _matrix_sha256(matrix: Matrix) -> str:
    return hashlib.sha256(np.ascontiguousarray(matrix, dtype="<f4").tobytes()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_sha256(model: Path) -> str:
    """Of a checkpoint, or of a folder's weights: its one file, or the hashes of several."""
    if model.is_file():
        return _file_sha256(model)
    preferred = {file.parent: file for name in reversed(_WEIGHTS) for file in sorted(model.rglob(name))}
    hashes = [_file_sha256(file) for _, file in sorted(preferred.items())]
    if not hashes:
        raise UserError(f"{model} holds no text model: expected one of {', '.join(_WEIGHTS)} in it")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(" .:")


# --- Text models ------------------------------------------------------------------------------------------------------


def encode(encoder: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], TextModel]:
    """``texts`` [n] by ``sbert`` or ``clip``, on the CPU: float32 [n, d].

    ``UserError``: the model can't be had; without a connection that takes no longer than importing the library.
    """
    source = _source(encoder)
    run, libraries = _TEXT_MODELS[source.encoder]
    revision = source.local_revision()
    try:
        with _short_wait(online=source.local is None):
            matrix, loaded = run(source, list(texts))
            revision = revision or f"state-sha256:{_state_sha256(loaded)}"
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen types, their own and others'
        raise UserError(f"can't have {source.title} ({_reason(error)}). {source.ways_out}") from error
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return matrix, TextModel(source.encoder, source.model, revision, versions)


@contextlib.contextmanager
def _short_wait(online: bool) -> Iterator[None]:
    """Where the model hub is out of reach, only its cache is looked at: its client would go on trying (CLIP: 46 s)."""
    from huggingface_hub import constants, get_session

    offline, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    if online and not offline:
        try:
            if get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code >= 500:
                raise ConnectionError("it answers with an error")
        except Exception as error:  # of whichever HTTP library the hub's client uses
            log.info("the model hub can't be reached (%s): only its cache is looked at", _reason(error))
            constants.HF_HUB_OFFLINE = True
    logging.disable(max(disabled, logging.ERROR))  # open_clip logs what it also raises
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(disabled)


def _run_sbert(source: _Source, texts: list[str]) -> tuple[NDArray[np.float32], Any]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source.local or source.argument), device="cpu")
    rows = model.encode(texts, show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(rows, dtype=np.float32), model


def _run_clip(source: _Source, texts: list[str]) -> tuple[NDArray[np.float32], Any]:
    import open_clip
    import torch

    architecture, _, weights = source.argument.partition("/")
    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=5)
        raise unknown("CLIP architecture", architecture, near, "`open_clip.list_models()` lists them all")
    if source.local is None and weights not in open_clip.list_pretrained_tags_by_model(architecture):
        raise unknown(f"weights of {architecture}", weights, open_clip.list_pretrained_tags_by_model(architecture))
    model = open_clip.create_model(architecture, pretrained=str(source.local or weights), device="cpu").eval()
    tokens = open_clip.get_tokenizer(architecture)(texts)
    with torch.inference_mode():
        rows = torch.cat([model.encode_text(part) for part in tokens.split(BATCH)])
    return rows.float().numpy(), model


_TEXT_MODELS: dict[str, tuple[Callable[[_Source, list[str]], tuple[NDArray[np.float32], Any]], tuple[str, ...]]] = {
    "clip": (_run_clip, ("open_clip_torch", "torch")),
    "sbert": (_run_sbert, ("sentence-transformers", "transformers", "torch")),
}


def _state_sha256(model: Any) -> str:
    """Of all parameters and buffers by name: for weights whose file the library keeps to itself."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()
