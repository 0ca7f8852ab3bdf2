"""Make the label-text embeddings that are shipped with the package.

Called as ``python -m dfkd_bench.benchmarks.make_embeddings --output FOLDER [--sbert MODEL] [--wordnet DICT] [data set
...]``. For every built-in data set whose class names are at hand it writes one file with the prompts that have class
names in them, and one more with the prompts that have only indices: they serve any data set with no more classes.
Stored as float16.

``--sbert``: the folder or the name of all-MiniLM-L6-v2; about two minutes on one core.

``--wordnet``: the folder of WordNet 3.0's database (``data.noun`` and its sisters; Debian's package wordnet-base has it
in /usr/share/wordnet). Its 117,659 synsets become the corpus ``wordnet-3.0.txt``, a Doc2Vec is trained on it; about
two minutes on one core. ``--corpus FOLDER`` keeps the corpus there, for ``-s nayer.encoder=doc2vec:corpus=FILE``.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dfkd_bench import data, text
from dfkd_bench.encoders import TextEncoder, build_encoder, file_sha256
from dfkd_bench.encoders.doc2vec import WORDNET, words
from dfkd_bench.encoders.sbert import DEFAULT_MODEL
from dfkd_bench.errors import UserError

INDEX_CLASSES = 1000
PARTS = ("noun", "verb", "adj", "adv")

log = logging.getLogger(__name__)


# --- WordNet ----------------------------------------------------------------------------------------------------------


def documents(dictionary: Path) -> Iterator[str]:
    """A line for each synset: ``lemma, lemma: gloss``, in the order of the files noun, verb, adj, adv and their lines.

    Format of the lines: WordNet's manual page wndb(5WN). ``UserError``: the folder has no such files.
    """
    for part in PARTS:
        path = dictionary / f"data.{part}"
        if not path.is_file():
            raise UserError(f"{dictionary} is no folder of WordNet's database: it has no file {path.name}")
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]  # every second field is the lemma's number
            plain = (re.sub(r"\((a|p|ip)\)$", "", lemma).replace("_", " ") for lemma in lemmas)  # an adjective's place
            yield f"{', '.join(plain)}: {gloss.strip()}"


def write_corpus(dictionary: Path, folder: Path) -> Path:
    """``wordnet-3.0.txt`` in ``folder``."""
    path = folder / WORDNET
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in documents(dictionary)), encoding="utf-8", newline="\n")
    log.info("%s: sha256 %s", path, file_sha256(path))
    return path


def known_indices(corpus: Path) -> int:
    """How many numbers from 0 on are words of the corpus: the others have no row of their own."""
    known = set(words(corpus.read_text(encoding="utf-8")))
    return next(index for index in range(INDEX_CLASSES + 1) if str(index) not in known or index == INDEX_CLASSES)


# --- Encoding ---------------------------------------------------------------------------------------------------------


def make(encoder: TextEncoder, model: str, suffix: str, output: Path, indices: int, datasets: Sequence[str]) -> None:
    """Write ``<data set><suffix>`` for each of ``datasets``, and ``index<suffix>``, into ``output``.

    ``model``: the name that users ask for, whatever folder the model was read from.
    """
    named = [prompt for prompt in text.PROMPTS.values() if "{name}" in prompt]
    indexed = [prompt for prompt in text.PROMPTS.values() if "{name}" not in prompt]
    _write(encoder, model, output / f"index{suffix}", indexed, [""] * indices)
    for name in datasets:
        try:
            class_names = data.dataset(name).class_names
        except UserError as error:
            log.warning("left out: %s", error)
            continue
        _write(encoder, model, output / f"{name}{suffix}", named, class_names)


def _write(encoder: TextEncoder, model: str, path: Path, prompts: Sequence[str], class_names: Sequence[str]) -> None:
    tables = {}
    for prompt in prompts:
        texts = text.render(prompt, class_names)
        matrix, origin = text.encode(encoder, texts)
        tables[prompt] = (texts, matrix.astype(np.float16))
    text.store(path, dataclasses.replace(origin, model=model), tables)
    log.info("%s: %d classes, revision %s", path, len(class_names), origin.revision)


def make_sbert(model: str, output: Path, datasets: Sequence[str]) -> None:
    """``<data set>.safetensors``."""
    encoder = build_encoder(f"sbert:{model}")
    assert isinstance(encoder, TextEncoder)
    make(encoder, DEFAULT_MODEL, ".safetensors", output, INDEX_CLASSES, datasets)


def make_doc2vec(corpus: Path, output: Path, datasets: Sequence[str]) -> None:
    """``<data set>.doc2vec.safetensors``."""
    encoder = build_encoder(f"doc2vec:corpus={corpus}")
    assert isinstance(encoder, TextEncoder)
    make(encoder, encoder.model, ".doc2vec.safetensors", output, known_indices(corpus), datasets)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder the files are written to")
    parser.add_argument("--sbert", metavar="MODEL", help="./FOLDER or name of all-MiniLM-L6-v2")
    parser.add_argument("--wordnet", metavar="DICT", type=Path, help="folder with data.noun, data.verb, ...")
    parser.add_argument("--corpus", metavar="FOLDER", type=Path, help="keep WordNet's corpus in this folder")
    parser.add_argument("datasets", nargs="*", default=data.dataset_names(), help="default: all built-in ones")
    given = parser.parse_args(arguments)
    if given.sbert is None and given.wordnet is None:
        parser.error("nothing to make: give --sbert MODEL, --wordnet DICT, or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("gensim").setLevel(logging.WARNING)
    try:
        if given.sbert is not None:
            make_sbert(given.sbert, given.output, given.datasets)
        if given.wordnet is not None:
            with tempfile.TemporaryDirectory() as temporary:
                corpus = write_corpus(given.wordnet, given.corpus or Path(temporary))
                make_doc2vec(corpus, given.output, given.datasets)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
