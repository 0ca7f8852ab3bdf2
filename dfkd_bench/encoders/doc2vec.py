"""``doc2vec[:PATH | :corpus=FILE,...]``: gensim's paragraph vectors, inferred for each text (default d = 100).

There is no standard pre-trained Doc2Vec. So the argument says what it was trained on:

- ``doc2vec``: the glosses of WordNet 3.0 with the default settings. Its embeddings of the built-in data sets are
  shipped (``embeddings/``), the model is not: for other texts it is trained again, as docs/embeddings.md says;
- ``doc2vec:corpus=FILE``: trained here on a text file, one document a line; settings may follow, as in
  ``doc2vec:corpus=my.txt,size=50,epochs=40``;
- ``doc2vec:PATH``: a model that gensim saved. Such a file is a pickle: it is read by an unpickler that knows the
  classes of such models only.

Words are runs of letters and digits in lower case; words that the model has never seen are left out. The same
input gives the same rows: one thread, and every text is inferred from a start of its own.

Le and Mikolov, "Distributed Representations of Sentences and Documents", ICML 2014. https://arxiv.org/abs/1405.4053
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dfkd_bench.encoders import INDEX_ROWS, NO_MODEL_NEEDED, Rows, TextEncoder, file_sha256, first_line
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.paths import expanded

WORDNET = "wordnet-3.0.txt"
"""The corpus of the shipped embeddings: the file's name that ``benchmarks/make_embeddings.py`` gives it."""

INFERENCE_EPOCHS = 200  # of one text: short ones need many until their row stands still

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Of the training; where gensim has a default (all but ``epochs`` and ``min_count``) it is gensim's."""

    size: int = 100
    """Width of the rows."""
    window: int = 5
    """Words before and behind that a word is predicted from."""
    epochs: int = 20
    min_count: int = 1
    """Rarer words are left out. 1, since class names may well be rare."""
    seed: int = 0

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


_LIMITS = {
    "size": (1, 4096),
    "window": (1, 100),
    "epochs": (1, 10_000),
    "min_count": (1, 10**6),
    "seed": (0, 2**32 - 1),
}


class Doc2Vec(TextEncoder):
    """Distributed memory (PV-DM), as in gensim's default."""

    expected: ClassVar[str] = (
        "'doc2vec', 'doc2vec:PATH' with a model that gensim saved, or 'doc2vec:corpus=FILE' with one document a line, "
        "as in 'doc2vec:corpus=my.txt,size=50,epochs=40,seed=1'"
    )
    libraries: ClassVar[tuple[str, ...]] = ("gensim", "numpy")

    def __init__(self, name: str, argument: str = "") -> None:
        super().__init__(name, argument)
        self.settings = Settings()
        self.corpus: Path | None = None
        self.saved: Path | None = None
        if "=" in argument.partition("/")[0]:
            self.corpus, self.settings = self._parse(argument)
        elif argument:
            self.saved = expanded(argument)
        for path in (self.corpus, self.saved):
            if path is not None and not path.is_file():
                raise UserError(f"text encoder '{self.spec}': there is no file {path}; expected {self.expected}")

    def _parse(self, argument: str) -> tuple[Path, Settings]:
        given = dict(pair.split("=", 1) for pair in re.split(r",(?=\w+=)", argument))
        if not given.get("corpus"):
            raise UserError(f"text encoder '{self.spec}' names no corpus: expected {self.expected}")
        corpus = expanded(given.pop("corpus"))
        for key, value in given.items():
            if key not in _LIMITS:
                raise unknown("setting of doc2vec", key, ["corpus", *_LIMITS])
            low, high = _LIMITS[key]
            if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
                raise UserError(f"text encoder '{self.spec}': expected {key} from {low} to {high}, not '{value}'")
        return corpus, Settings(**{key: int(value) for key, value in given.items()})

    @property
    def model(self) -> str:
        """The saved model's name, or the corpus' with all settings."""
        if self.saved is not None:
            return self.saved.name
        return f"corpus={self.corpus.name if self.corpus else WORDNET},{self.settings}"

    @property
    def title(self) -> str:
        if self.saved is not None:
            return f"the Doc2Vec model {self.saved}"
        return f"a Doc2Vec trained on {self.corpus or 'the glosses of WordNet'}"

    @property
    def ways_out(self) -> str:
        return (
            "`-s METHOD.encoder=doc2vec:PATH` takes a model that gensim saved, `doc2vec:corpus=FILE` trains one on a "
            f"text file, one document a line (docs/embeddings.md: how to make WordNet's). {NO_MODEL_NEEDED}"
        )

    def weights(self) -> str | None:
        """Of the saved model, with the arrays that gensim puts beside a big one, or of the corpus."""
        if self.saved is not None:
            beside = sorted(self.saved.parent.glob(f"{_literally(self.saved.name)}.*.npy"))
            return ",".join(f"sha256:{file_sha256(path)}" for path in (self.saved, *beside))
        return None if self.corpus is None else f"corpus-sha256:{file_sha256(self.corpus)}"

    def encode(self, texts: Sequence[str]) -> tuple[Rows, str]:
        """``UserError``: no model, or a text without a single word that it knows."""
        revision = self.weights()
        if revision is None:
            raise UserError(
                f"the Doc2Vec trained on WordNet's glosses is not shipped, only its embeddings of built-in data sets "
                f"are, P3 of {INDEX_ROWS} classes at most. {self.ways_out}"
            )
        model = _load(self.saved) if self.saved is not None else _train(self.corpus, revision, self.settings)
        known = [[word for word in words(text) if word in model.wv] for text in texts]
        for text, rest in zip(texts, known, strict=True):
            if not rest:
                raise UserError(
                    f"{self.title} knows no word of '{text}': take a corpus that has it, or another encoder"
                )
        _warn_of_equal_rows(texts, known)
        return np.stack([_infer(model, rest, self.settings.seed) for rest in known]), revision


def words(text: str) -> list[str]:
    """What a text is cut into.

    >>> words("A T-shirt, red_fox 7")
    ['a', 't', 'shirt', 'red', 'fox', '7']
    """
    return re.findall(r"[^\W_]+", text.lower())


def _literally(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _warn_of_equal_rows(texts: Sequence[str], known: Sequence[Sequence[str]]) -> None:
    distinct = dict(zip(texts, map(" ".join, known), strict=True))
    counts = Counter(distinct.values())
    lost = [text for text, rest in distinct.items() if counts[rest] > 1]
    if lost:
        log.warning(
            "Doc2Vec gives %d texts, as '%s', the row of another: it doesn't know their words", len(lost), lost[0]
        )


@functools.lru_cache(maxsize=1)
def _train(corpus: Path, _sha256: str, settings: Settings) -> Any:
    """Kept for further prompts; ``_sha256`` tells a corpus that was changed meanwhile."""
    from gensim.models.doc2vec import Doc2Vec as Model
    from gensim.models.doc2vec import TaggedDocument

    try:
        lines = corpus.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"corpus {corpus} is no UTF-8 text ({error.reason}): expected one document a line") from None
    documents = [TaggedDocument(found, [index]) for index, found in enumerate(filter(None, map(words, lines)))]
    if len({word for document in documents for word in document.words}) < 2:
        raise UserError(f"corpus {corpus} has no words to learn from: expected one document a line")
    return Model(
        documents,
        dm=1,
        vector_size=settings.size,
        window=settings.window,
        epochs=settings.epochs,
        min_count=settings.min_count,
        seed=settings.seed,
        workers=1,  # more would make the result a matter of chance
    )


def _infer(model: Any, text: list[str], seed: int) -> Rows:
    """The row of one text, float32 [d]; it doesn't depend on what was inferred before."""
    model.random.seed(seed)
    with _stable_start():
        row = model.infer_vector(text, epochs=INFERENCE_EPOCHS)
    return np.asarray(row, dtype=np.float32)


@contextlib.contextmanager
def _stable_start() -> Iterator[None]:
    """gensim draws the start of an inference from Python's hash of the text, which differs from process to process."""
    from gensim.models import doc2vec

    original = doc2vec.pseudorandom_weak_vector
    doc2vec.pseudorandom_weak_vector = functools.partial(original, hashfxn=lambda text: zlib.crc32(text.encode()))
    try:
        yield
    finally:
        doc2vec.pseudorandom_weak_vector = original


# --- A model that gensim saved ----------------------------------------------------------------------------------------

_CLASSES = {
    "builtins": {"hash", "int"},
    "collections": {"defaultdict"},
    "gensim.models.doc2vec": {"Doc2Vec", "Doctag"},
    "gensim.models.keyedvectors": {"KeyedVectors", "CompatVocab"},
    "gensim.utils": {"call_on_class_only"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.random._mt19937": {"MT19937"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__randomstate_ctor"},
}


class _ModelsOnly(pickle.Unpickler):
    """Unpickles what gensim's Doc2Vec is made of; a pickle that names anything else is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no Doc2Vec has")
        return super().find_class(module, name)


def _load(path: Path) -> Any:
    from gensim import utils
    from gensim.models.doc2vec import Doc2Vec as Model

    def read(name: str) -> Any:
        with open(name, "rb") as file:
            return _ModelsOnly(file, encoding="latin1").load()

    original = utils.unpickle
    utils.unpickle = read
    try:
        model = Model.load(str(path))
    except Exception as error:  # a file that is something else may fail in any way
        raise UserError(f"{path} holds no Doc2Vec model that gensim saved ({first_line(error)})") from None
    finally:
        utils.unpickle = original
    return model
