"""Doc2Vec: trained on ten lines, loaded from a file, shipped; the same rows in every process."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfkd_bench import data, text
from dfkd_bench.encoders import doc2vec
from dfkd_bench.encoders.doc2vec import Settings, words
from dfkd_bench.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # warnings of gensim are not ours

LINES = """\
a red fox runs in the forest
an oak tree grows in the forest
the fox hunts at night
the tree is old and its oak wood is hard
a Königspinguin swims in cold water
the ship sails on the water
a red ship and an old ship
night falls in the old forest
cold water runs under the tree
the crane stands in the water
"""
OWN = ("Red_fox", "oak-tree", "ship")


@pytest.fixture
def corpus(tmp_path: Path, home: Path) -> Path:
    path = tmp_path / "ten.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def encoded(spec: str, names: tuple[str, ...] = OWN, prompt: str = "P1") -> text.LabelEmbeddings:
    return text.ensure("own", names, spec, prompt)


# --- Trained on a corpus ----------------------------------------------------------------------------------------------


def test_words_are_letters_and_digits_in_lower_case() -> None:
    assert words("A Königs-pinguin, red_fox (7)!") == ["a", "königs", "pinguin", "red", "fox", "7"]


def test_a_corpus_gives_a_row_for_each_class(corpus: Path) -> None:
    found = encoded(f"doc2vec:corpus={corpus},size=12")
    assert found.matrix.shape == (3, 12)
    assert len(np.unique(found.matrix, axis=0)) == 3


def test_the_record_names_corpus_and_settings(corpus: Path) -> None:
    facts = encoded(f"doc2vec:corpus={corpus},size=12,seed=3").facts()
    assert facts["model"] == "corpus=ten.txt,size=12,window=5,epochs=20,min_count=1,seed=3"
    assert facts["revision"] == f"corpus-sha256:{hashlib.sha256(corpus.read_bytes()).hexdigest()}"


IN_ANOTHER_PROCESS = """
import sys, warnings
warnings.simplefilter("ignore")
from dfkd_bench.encoders import build_encoder
rows, _ = build_encoder(sys.argv[1]).encode(sys.argv[2:])
print(rows.tobytes().hex())
"""


def test_the_same_rows_in_every_process(corpus: Path) -> None:
    spec, texts = f"doc2vec:corpus={corpus},size=8", ("red fox", "oak tree")
    seed = str((hash("red fox") + 1) % 1000)  # gensim starts an inference from Python's hash of the text
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, spec, *texts]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == encoded(spec, texts).matrix.tobytes().hex()


def test_a_row_does_not_depend_on_the_other_classes(corpus: Path) -> None:
    spec = f"doc2vec:corpus={corpus},size=8"
    np.testing.assert_array_equal(encoded(spec).matrix[::-1], encoded(spec, OWN[::-1]).matrix)


def test_another_seed_gives_other_rows(corpus: Path) -> None:
    one, two = (encoded(f"doc2vec:corpus={corpus},size=8,seed={seed}").matrix for seed in (0, 1))
    assert np.abs(one - two).max() > 1e-3


def test_a_changed_corpus_is_encoded_anew(corpus: Path) -> None:
    spec = f"doc2vec:corpus={corpus},size=8"
    first = encoded(spec)
    corpus.write_text(LINES.replace("red", "blue red"), encoding="utf-8")
    second = encoded(spec)
    assert first.revision != second.revision
    assert np.abs(first.matrix - second.matrix).max() > 1e-4


def test_one_training_serves_several_prompts(corpus: Path) -> None:
    doc2vec._train.cache_clear()
    for prompt in ("P1", "P2"):
        encoded(f"doc2vec:corpus={corpus},size=9", prompt=prompt)
    assert doc2vec._train.cache_info().misses == 1


def test_accents_and_duplicates_are_kept(corpus: Path) -> None:
    matrix = encoded(f"doc2vec:corpus={corpus},size=8", ("Königspinguin", "crane", "crane")).matrix
    np.testing.assert_array_equal(matrix[1], matrix[2])
    assert np.abs(matrix[0] - matrix[1]).max() > 1e-3


def test_texts_that_the_model_cannot_tell_apart_are_a_warning(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoded(f"doc2vec:corpus={corpus},size=8", ("red wombat", "red", "red quokka", "ship"))
    assert [record.message for record in caplog.records if record.name.startswith("dfkd_bench")] == [
        "Doc2Vec gives 3 texts, as 'red wombat', the row of another: it doesn't know their words"
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("corpus=", "names no corpus"),
        ("size=3", "names no corpus"),
        ("corpus=/no/file.txt", "there is no file /no/file.txt"),
        ("/no/file.model", "there is no file /no/file.model"),
        ("corpus={corpus},sise=3", "unknown setting of doc2vec 'sise': did you mean 'size'?"),
        ("corpus={corpus},size=0", "expected size from 1 to 4096, not '0'"),
        ("corpus={corpus},epochs=many", "expected epochs from 1 to 10000, not 'many'"),
    ],
)
def test_a_wrong_argument_is_one_line(argument: str, message: str, corpus: Path) -> None:
    with pytest.raises(UserError) as raised:
        text.load("own", OWN, f"doc2vec:{argument.format(corpus=corpus)}", "P1")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_text_without_a_known_word_is_one_line(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"a Doc2Vec trained on .*ten\.txt knows no word of 'wombat'"):
        encoded(f"doc2vec:corpus={corpus}", ("red fox", "wombat"))


@pytest.mark.parametrize(("content", "message"), [(b"", "no words"), (b"...\n\n", "no words"), (b"\xff", "no UTF-8")])
def test_a_corpus_that_is_none_is_one_line(content: bytes, message: str, corpus: Path) -> None:
    corpus.write_bytes(content)
    with pytest.raises(UserError, match=message):
        encoded(f"doc2vec:corpus={corpus}")


# --- A model that gensim saved ----------------------------------------------------------------------------------------


def saved_model(path: Path, **options: Any) -> Any:
    from gensim.models.doc2vec import Doc2Vec, TaggedDocument

    documents = [TaggedDocument(words(line), [index]) for index, line in enumerate(LINES.splitlines())]
    return Doc2Vec(documents, vector_size=10, min_count=1, workers=1, epochs=5, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"dm": 0}, {"dm": 0, "dbow_words": 1}, {"dm_concat": 1}, {"dm": 0, "hs": 1, "negative": 0}],
    ids=["dm", "dbow", "dbow with words", "dm concat", "dbow, hierarchical"],
)
def test_a_saved_model_is_read(options: dict[str, int], tmp_path: Path, home: Path) -> None:
    path = tmp_path / "mine.model"
    saved_model(path, **options).save(str(path))
    found = encoded(f"doc2vec:{path}")
    assert found.matrix.shape == (3, 10)
    assert found.model == "mine.model"
    assert found.revision == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_arrays_beside_a_saved_model_count(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "big.model"
    saved_model(path).save(str(path), sep_limit=0)
    first = encoded(f"doc2vec:{path}")
    vectors = tmp_path / "big.model.wv.vectors.npy"
    np.save(vectors, np.load(vectors) + 1)
    second = encoded(f"doc2vec:{path}")
    assert first.revision != second.revision
    assert first.sha256 != second.sha256


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(Harmful())])
def test_a_file_that_holds_no_model_is_refused(
    content: bytes, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.model holds no Doc2Vec model that gensim saved"):
        encoded(f"doc2vec:{path}")
    assert not (tmp_path / "harm").exists()


# --- Shipped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["P1", "P2", "P3", "nayer"])
@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_embeddings_of_small_data_sets_are_shipped(dataset: str, prompt: str) -> None:
    names = data.dataset(dataset).class_names
    found = text.load(dataset, names, "doc2vec", prompt)
    assert (found.path, found.matrix.shape) == ("shipped", (len(names), 100))
    assert len(np.unique(found.matrix, axis=0)) == len(names)


def test_the_shipped_model_is_the_one_of_the_default_settings() -> None:
    found = text.load("cifar10", data.dataset("cifar10").class_names, "doc2vec", "P2")
    assert found.model == f"corpus=wordnet-3.0.txt,{Settings()}"


def test_imagenet_is_shipped() -> None:
    found = text.load("imagenet", data.dataset("imagenet").class_names, "doc2vec", "P2")
    assert (found.path, found.matrix.shape) == ("shipped", (1000, 100))


def test_shipped_embeddings_know_what_words_mean() -> None:
    names = data.dataset("cifar100").class_names
    matrix = text.load("cifar100", names, "doc2vec", "P1").matrix
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    similar = unit @ unit.T - 2 * np.eye(100)
    trees = {index for index, name in enumerate(names) if name.endswith("tree")}
    assert all(int(similar[index].argmax()) in trees for index in trees)


def test_without_the_model_one_line_says_what_to_do(home: Path) -> None:
    with pytest.raises(UserError) as raised:
        encoded("doc2vec")
    message = str(raised.value)
    assert message.startswith("the Doc2Vec trained on WordNet's glosses is not shipped, only its embeddings")
    assert all(way in message for way in ("doc2vec:PATH", "doc2vec:corpus=FILE", "sbert", "onehot", "random"))
    assert "\n" not in message


# --- How the shipped ones are made ------------------------------------------------------------------------------------

NOUNS = """\
  1 This software and database is being provided to you
00001740 03 n 02 living_thing 0 Red_fox 1 000 | a living entity; "it runs" \n\
00001930 03 n 01 oak 0 001 @ 00001740 n 0000 | a tree 0 1 3
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    folder = tmp_path / "dict"
    folder.mkdir()
    for part, content in (
        ("noun", NOUNS),
        ("verb", ""),
        ("adv", ""),
        ("adj", "00 00 a 01 afraid(p) 0 000 | in fear\n"),
    ):
        (folder / f"data.{part}").write_text(content)
    return folder


def test_a_synset_is_a_line_of_the_corpus(wordnet: Path) -> None:
    from dfkd_bench.benchmarks.make_embeddings import documents

    assert list(documents(wordnet)) == [
        'living thing, Red fox: a living entity; "it runs"',
        "oak: a tree 0 1 3",
        "afraid: in fear",
    ]


def test_index_prompts_reach_as_far_as_the_corpus_knows_numbers(wordnet: Path, tmp_path: Path) -> None:
    from dfkd_bench.benchmarks.make_embeddings import known_indices, write_corpus

    assert known_indices(write_corpus(wordnet, tmp_path)) == 2  # 0 and 1, but not 2


def test_a_folder_without_wordnet_is_one_line(tmp_path: Path) -> None:
    from dfkd_bench.benchmarks.make_embeddings import documents

    with pytest.raises(UserError, match=r"is no folder of WordNet's database: it has no file data\.noun"):
        list(documents(tmp_path))


def test_the_scripts_files_are_read_as_shipped_ones_are(corpus: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    from dfkd_bench.benchmarks.make_embeddings import make_doc2vec

    corpus.write_text(
        LINES
        + " ".join(map(str, range(5)))
        + "\na class of an image photo\n zero one two three four five six seven eight nine"
    )
    make_doc2vec(corpus, tmp_path / "made", ["digits"])
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "digits.doc2vec.safetensors",
        "index.doc2vec.safetensors",
    ]
    with safe_open(tmp_path / "made" / "index.doc2vec.safetensors", framework="numpy") as file:
        assert file.get_tensor("a class of {index}").shape == (5, 100)
        assert set(json.loads(file.metadata()["libraries"])) == {"gensim", "numpy"}
