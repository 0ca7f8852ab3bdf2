"""Teachers: trained by a recipe, resumed, kept with their hash; foreign checkpoints taken over or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from dfkd_bench import compute, plugins, teacher_commands, teachers
from dfkd_bench.compute import Compute
from dfkd_bench.data import Arrays, DataSet, Part, RawData, _arrays, dataset
from dfkd_bench.engines.local import TeacherTask, _teacher_child
from dfkd_bench.errors import UserError
from dfkd_bench.job import Recipe, TeacherSpec
from dfkd_bench.models import build_model
from dfkd_bench.paths import HOME_VARIABLE
from dfkd_bench.run import Place
from dfkd_bench.teachers import TeacherCard, TrainingProgress, import_checkpoint

CPU = torch.device("cpu")
DIGITS = dataset("digits")
SPEC = TeacherSpec(model="convnet8", recipe=Recipe(epochs=3, batch_size=64, include_validation=False))


def read_colours(found: DataSet, root: Path, part: Part) -> RawData:
    """CIFAR-10's shape and classes, a few images."""
    rng = np.random.default_rng(0)
    count = 30 if part == "train" else 20
    return RawData.of_arrays(rng.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count) % 10)


COLOURS = DataSet(
    "colours", "32x32 RGB", 10, tuple("abcdefghij"), (3, 32, 32), (0.5,) * 3, (0.25,) * 3, True, 10, "here",
    read_colours,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with digits and the teacher of ``SPEC``."""
    place = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(place))
        teachers.train(DIGITS, SPEC, Compute(CPU))
    yield place
    torch.set_num_threads(threads)


@pytest.fixture
def at_hand(trained: Path, home: Path) -> Path:
    """The same in a home of the test's own; returns the teacher's folder."""
    shutil.copytree(trained, home)
    return teachers.folder(DIGITS, SPEC)


@pytest.fixture
def data_only(trained: Path, home: Path) -> Path:
    """A home of the test's own with digits and no teacher."""
    shutil.copytree(trained, home, ignore=shutil.ignore_patterns("teachers"))
    return home


@pytest.fixture
def pth(tmp_path: Path) -> Callable[..., Path]:
    """``pth(content, name)``: a foreign checkpoint file."""

    def write(content: Any, name: str = "foreign.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def weights_of(place: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(place / "weights.safetensors")


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- Beside the records -----------------------------------------------------------------------------------------------


def test_the_teacher_beside_the_records_comes_before_that_of_the_home(at_hand: Path, tmp_path: Path) -> None:
    teachers.keep_beside(DIGITS, SPEC, tmp_path)
    assert teachers.find(DIGITS, SPEC, tmp_path) == teachers.folder(DIGITS, SPEC, tmp_path) != at_hand


def test_without_one_beside_the_records_it_is_that_of_the_home(at_hand: Path, tmp_path: Path) -> None:
    assert teachers.find(DIGITS, SPEC, tmp_path) == at_hand


def test_a_teacher_that_lies_beside_the_records_is_not_overwritten(at_hand: Path, tmp_path: Path) -> None:
    teachers.keep_beside(DIGITS, SPEC, tmp_path)
    theirs = teachers.folder(DIGITS, SPEC, tmp_path) / "weights.safetensors"
    theirs.write_bytes(b"another machine's")
    teachers.keep_beside(DIGITS, SPEC, tmp_path)
    assert theirs.read_bytes() == b"another machine's"


def test_a_kept_teacher_can_be_loaded_without_the_home(at_hand: Path, tmp_path: Path) -> None:
    teachers.keep_beside(DIGITS, SPEC, tmp_path)
    shutil.rmtree(at_hand)
    loaded = teachers.load(DIGITS, SPEC, CPU, output=tmp_path).model.state_dict()
    kept = weights_of(teachers.folder(DIGITS, SPEC, tmp_path))
    assert all(torch.equal(value, kept[name]) for name, value in loaded.items())


def test_runs_on_the_side_take_the_teachers_of_the_records_along(at_hand: Path, tmp_path: Path) -> None:
    teachers.keep_beside(DIGITS, SPEC, tmp_path)
    teachers.take_along(tmp_path, tmp_path / "trials")
    weights = teachers.folder(DIGITS, SPEC, tmp_path / "trials") / "weights.safetensors"
    assert weights.read_bytes() == (at_hand / "weights.safetensors").read_bytes()


def test_an_imported_teacher_is_not_copied(home: Path, tmp_path: Path) -> None:
    imported = TeacherSpec(model="convnet8", recipe=None, sha256="0" * 64)
    teachers.keep_beside(DIGITS, imported, tmp_path)
    assert not (tmp_path / "teachers").exists()


# --- Training ---------------------------------------------------------------------------------------------------------


def test_a_few_epochs_teach_digits(at_hand: Path) -> None:
    card = teachers.read_card(at_hand)
    assert card.accuracy["test"] > 60
    assert set(card.accuracy) == {"test", "validation"}  # its recipe leaves the validation part out
    assert (card.origin, card.classes, card.channels) == ("trained here", 10, 1)


def test_teachers_are_trained_with_the_kernels_that_their_runs_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(compute, "prepare", lambda device, deterministic: asked.append(deterministic))
    monkeypatch.setattr(compute, "set_threads", lambda count: None)
    monkeypatch.setattr(teachers, "train", lambda *_: None)
    task, place = TeacherTask("digits", SPEC, "fp32"), Place(tmp_path, device="cpu", deterministic=True)
    _here, there = Pipe()  # a run whose other end is closed does nothing
    _teacher_child(task, place, there)
    assert asked == [True]


def test_a_loaded_teacher_is_frozen_and_in_eval_mode(at_hand: Path) -> None:
    teacher = teachers.load(DIGITS, SPEC, CPU)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    kept = weights_of(at_hand)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.model.state_dict().items())


def test_the_recipe_decides_which_teacher_it_is(home: Path) -> None:
    other = SPEC.model_copy(update={"recipe": Recipe(epochs=4, batch_size=64, include_validation=False)})
    seed = SPEC.model_copy(update={"seed": 1})
    assert len({teachers.folder(DIGITS, spec) for spec in (SPEC, other, seed)}) == 3


def test_controls_see_what_the_teacher_saw_and_never_what_they_are_evaluated_on() -> None:
    assert teachers.training_splits(SPEC) == ("train",)
    assert teachers.training_splits(TeacherSpec(model="convnet8")) == ("train", "validation")
    imported = TeacherSpec(model="x", recipe=None, sha256="ab")
    assert teachers.training_splits(imported) == ("train", "validation")
    assert teachers.control_splits(imported, "test") == ("train", "validation")
    assert teachers.control_splits(imported, "validation") == ("train",)
    assert teachers.control_splits(SPEC, "validation") == ("train",)


def test_a_teacher_is_the_same_where_its_images_do_not_fit_on_the_device(
    trained: Path, data_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "labelled", partial(teachers.labelled, spare=lambda _: 0))
    card = teachers.train(DIGITS, SPEC, Compute(CPU))
    kept = next(trained.glob("teachers/digits/*"))
    whole, other = weights_of(kept), weights_of(teachers.folder(DIGITS, SPEC))
    assert all(torch.equal(value, other[name]) for name, value in whole.items())
    assert card.accuracy == teachers.read_card(kept).accuracy


def mapped_file(tensor: Tensor) -> str:
    """The file whose mapping holds the tensor's memory; empty if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return name if name.startswith("/") else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system doesn't tell what is mapped")
@pytest.mark.parametrize("private", [0, 2**30])
def test_prepared_images_are_mapped_and_not_copied(private: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones as they were opened, others anew, so that they may be written to."""
    opened = DIGITS.split("train").images
    monkeypatch.setattr(_arrays, "PRIVATE_BYTES", private)
    monkeypatch.setattr(DataSet, "split", lambda *_: Arrays(opened, np.zeros(len(opened), np.int64)))
    lent = teachers.labelled(DIGITS, ("train",), None).images
    assert isinstance(lent, Tensor)
    assert isinstance(opened, np.memmap)
    assert mapped_file(lent) == str(opened.filename)
    assert (lent.data_ptr() == opened.ctypes.data) == (private == 0)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_training_ends_bit_identical(stop_after: int, trained: Path, data_only: Path) -> None:
    whole = weights_of(next(trained.glob("teachers/digits/*")))
    epochs: list[int] = []

    def stop(progress: TrainingProgress) -> None:
        epochs.append(progress.epoch)
        if progress.epoch == stop_after + 1 and len(epochs) == stop_after + 1:  # its own epoch is not saved yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teachers.train(DIGITS, SPEC, Compute(CPU), report=stop)
    assert not teachers.is_at_hand(DIGITS, SPEC)
    torch.rand(7)  # whatever happens in between
    teachers.train(DIGITS, SPEC, Compute(CPU), report=stop)
    assert epochs == [*range(1, stop_after + 2), *range(stop_after + 1, 4)]
    resumed = weights_of(teachers.folder(DIGITS, SPEC))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert not list(data_only.glob("**/training.safetensors"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_interrupted_training_goes_on_on_a_gpu(data_only: Path) -> None:
    def stop(progress: TrainingProgress) -> None:
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teachers.train(DIGITS, SPEC, Compute(torch.device("cuda", 0)), report=stop)
    epochs: list[int] = []
    teachers.train(DIGITS, SPEC, Compute(torch.device("cuda", 0)), report=lambda done: epochs.append(done.epoch))
    assert epochs == [2, 3]


def test_a_training_of_another_process_is_waited_for_and_not_done_again(
    trained: Path, data_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = teachers.folder(DIGITS, SPEC)
    place.mkdir(parents=True)
    (place / "lease").write_text(f'{{"host": "another-host", "pid": {os.getpid()}}}')

    def finished(_seconds: float) -> None:
        shutil.copytree(trained / "teachers", data_only / "teachers", dirs_exist_ok=True)
        (place / "lease").unlink()

    monkeypatch.setattr("time.sleep", finished)
    epochs: list[int] = []
    card = teachers.train(DIGITS, SPEC, Compute(CPU), report=lambda done: epochs.append(done.epoch))
    assert (card, epochs) == (teachers.read_card(place), [])


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_training_that_another_process_has_taken_over_is_left_to_it(
    epoch: int, trained: Path, data_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another kind of machine its teacher has other bits, and runs may have begun with it."""
    place, kept, slept = teachers.folder(DIGITS, SPEC), list[bool](), list[float]()
    monkeypatch.setattr(teachers, "_keep", lambda *_: kept.append(True))

    def take(progress: TrainingProgress) -> None:
        if progress.epoch == epoch:
            (place / "lease").write_text('{"host": "another-host", "pid": 1}')

    def finished(seconds: float) -> None:
        slept.append(seconds)
        shutil.copytree(trained / "teachers", data_only / "teachers", dirs_exist_ok=True)
        (place / "lease").unlink()

    monkeypatch.setattr("time.sleep", finished)
    card = teachers.train(DIGITS, SPEC, Compute(CPU), report=take)
    assert (card, kept, len(slept)) == (teachers.read_card(place), [], 1)


def test_a_damaged_checkpoint_of_a_teacher_starts_it_anew(trained: Path, data_only: Path) -> None:
    place = teachers.folder(DIGITS, SPEC)
    place.mkdir(parents=True)
    (place / "training.safetensors").write_bytes(b"garbage")
    teachers.train(DIGITS, SPEC, Compute(CPU))
    whole = weights_of(next(trained.glob("teachers/digits/*")))
    assert all(torch.equal(value, weights_of(place)[name]) for name, value in whole.items())


def test_a_diverging_recipe_is_one_line(data_only: Path) -> None:
    wild = TeacherSpec(model="convnet8", recipe=Recipe(epochs=2, lr=1e30, batch_size=64, include_validation=False))
    with pytest.raises(UserError, match="diverged: lower the recipe's lr"):
        teachers.train(DIGITS, wild, Compute(CPU))
    assert not teachers.is_at_hand(DIGITS, wild)


# --- Loading and verifying --------------------------------------------------------------------------------------------


def test_altered_weights_are_refused_by_name(at_hand: Path) -> None:
    path = at_hand / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"SHA-256 differs") as caught:
        teachers.load(DIGITS, SPEC, CPU)
    assert str(path) in one_line(caught)


def test_missing_weights_are_refused_by_name(at_hand: Path) -> None:
    (at_hand / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=at_hand.name):
        teachers.load(DIGITS, SPEC, CPU)


@pytest.mark.parametrize("text", ["", "{", '{"dataset": "digits"}'])
def test_a_damaged_card_is_refused_by_name(text: str, at_hand: Path) -> None:
    (at_hand / "teacher.json").write_text(text)
    with pytest.raises(UserError, match=r"teacher\.json is damaged") as caught:
        teachers.load(DIGITS, SPEC, CPU)
    one_line(caught)


def test_a_damaged_card_stops_no_other(at_hand: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = at_hand.with_name("damaged")
    shutil.copytree(at_hand, damaged)
    (damaged / "teacher.json").write_text("{")
    assert [place for place, _ in teachers.list_teachers()] == [at_hand]
    assert f"{damaged / 'teacher.json'} is damaged" in caplog.text
    other = replace(DIGITS, name="other")
    assert teachers.find_imported(other, "convnet8") is None


def test_no_teacher_says_how_to_make_one(home: Path) -> None:
    with pytest.raises(UserError, match="teacher train"):
        teachers.load(DIGITS, SPEC, CPU)


@pytest.mark.parametrize("change", [{"num_classes": 12}, {"image_shape": (3, 8, 8)}])
def test_a_teacher_for_other_classes_or_channels_is_refused(change: dict[str, Any], at_hand: Path) -> None:
    with pytest.raises(UserError, match="is for 10 classes and 1 channels, digits has") as caught:
        teachers.load(replace(DIGITS, **change), SPEC, CPU)
    assert at_hand.name in one_line(caught)


def test_verify_measures_what_the_card_says(at_hand: Path) -> None:
    assert teachers.verify(at_hand, DIGITS, None) == pytest.approx(teachers.read_card(at_hand).accuracy)


def test_verify_sees_another_accuracy(at_hand: Path) -> None:
    card = json.loads((at_hand / "teacher.json").read_text())
    card["accuracy"]["test"] -= 1
    (at_hand / "teacher.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="test accuracy is") as caught:
        teachers.verify(at_hand, DIGITS, None)
    assert at_hand.name in one_line(caught)


class Flat(nn.Module):
    """A plugin's model for images of 8x8."""

    def __init__(self, width: int, classes: int, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64 * channels, width)
        self.classifier = nn.Linear(width, classes)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        penultimate = self.hidden(images.flatten(1))
        return self.classifier(penultimate), penultimate, [penultimate]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0]


def flat(width: int) -> Callable[[int, int], nn.Module]:
    """The model as its file has it at some time."""
    return lambda classes, channels: Flat(width, classes, channels)


def test_a_teacher_of_a_plugins_model_that_was_changed_is_one_line(data_only: Path) -> None:
    spec = TeacherSpec(model="flat", recipe=Recipe(epochs=1, include_validation=False))
    teachers.train(DIGITS, spec, Compute(CPU), models={"flat": flat(5)})
    place = teachers.folder(DIGITS, spec)
    with pytest.raises(
        UserError, match=r"does not fit model flat of the plugin any more: hidden\.weight has shape"
    ) as caught:
        teachers.verify(place, DIGITS, None, {"flat": flat(6)})
    assert str(place) in one_line(caught)


def test_the_training_of_a_plugins_model_that_was_changed_starts_anew(data_only: Path) -> None:
    epochs: list[int] = []

    def stop(progress: TrainingProgress) -> None:
        epochs.append(progress.epoch)
        if len(epochs) == 2:  # the first is saved
            raise KeyboardInterrupt

    spec = TeacherSpec(model="flat", recipe=Recipe(epochs=3, include_validation=False))
    with pytest.raises(KeyboardInterrupt):
        teachers.train(DIGITS, spec, Compute(CPU), models={"flat": flat(5)}, report=stop)
    teachers.train(DIGITS, spec, Compute(CPU), models={"flat": flat(6)}, report=stop)
    assert epochs == [1, 2, 1, 2, 3]


def test_the_list_holds_every_teacher(at_hand: Path) -> None:
    assert [(place, card.spec) for place, card in teachers.list_teachers()] == [(at_hand, SPEC)]


def test_no_teachers_yet(home: Path) -> None:
    assert "no teachers yet" in str(teacher_commands.list_())


def test_verify_of_an_unknown_name_lists_those_at_hand(at_hand: Path) -> None:
    with pytest.raises(UserError, match=f"no teacher 'nobody'; at hand: {at_hand.name}"):
        list(teacher_commands.verify("nobody", "cpu", None, plugins.discover()))


# --- Foreign checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("key", ["", "state_dict", "model", "net"])
def test_a_foreign_checkpoint_is_taken_over(prefix: str, key: str, at_hand: Path, pth: Callable[..., Path]) -> None:
    weights = weights_of(at_hand)
    state = {prefix + name: value for name, value in weights.items()}
    card = import_checkpoint(pth({key: state, "epoch": 3} if key else state), DIGITS, "convnet8")
    assert card.accuracy["test"] == teachers.read_card(at_hand).accuracy["test"]
    assert (card.origin, card.spec.recipe, card.spec.sha256) == ("imported from foreign.pth", None, card.sha256)
    loaded = teachers.load(DIGITS, card.spec, CPU).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in weights.items())


def test_a_safetensors_file_is_taken_over(at_hand: Path, tmp_path: Path) -> None:
    file = shutil.copy(at_hand / "weights.safetensors", tmp_path / "digits_convnet8.safetensors")
    line = teacher_commands.import_(file, None, None, None, "cpu", None, plugins.discover())
    assert f"{teachers.read_card(at_hand).accuracy['test']:.2f} % test accuracy" in line


def test_a_file_without_counters_of_batches_is_taken_over(at_hand: Path, pth: Callable[..., Path]) -> None:
    weights = {name: value for name, value in weights_of(at_hand).items() if not name.endswith("num_batches_tracked")}
    card = import_checkpoint(pth(weights), DIGITS, "convnet8")
    assert card.accuracy["test"] == teachers.read_card(at_hand).accuracy["test"]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_torchvisions_resnets_fit_by_their_names(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        ours = build_model(f"resnet{depth}_imagenet", 1000)
    assert teachers._misfit(theirs, ours) == ""


def test_the_newest_import_is_found(at_hand: Path, pth: Callable[..., Path]) -> None:
    card = import_checkpoint(pth(weights_of(at_hand)), DIGITS, "convnet8")
    found = teachers.find_imported(DIGITS, "convnet8")
    assert found is not None
    assert found.sha256 == card.sha256
    assert teachers.find_imported(DIGITS, "wrn16_1") is None


class Foreign:
    """What a pickle may name and must not be run."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must not run",)


def random_state(classes: int = 10, channels: int = 1) -> dict[str, Tensor]:
    return build_model("convnet8", classes, channels).state_dict()


def renamed() -> dict[str, Tensor]:
    return {name.replace("classifier", "fc"): value for name, value in random_state().items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (renamed, "does not fit convnet8: 2 missing (first: classifier.weight); 2 unknown (first: fc.weight)"),
        (lambda: random_state(100), "does not fit convnet8 for digits (10 classes): classifier.weight has shape [100,"),
        (lambda: random_state(10, 3), "does not fit convnet8 for digits (10 classes): "),
        (
            lambda: {"state_dict": random_state(), "args": Foreign()},
            "is no plain state dict (a pickled module? it holds posix.system)",
        ),
        (
            lambda: build_model("convnet8", 10, 1),
            "holds dfkd_bench.models.convnet.ConvNet): save it with `torch.save(model.state_dict(), 'foreign.pth')`",
        ),
        (lambda: [1, 2], "holds no state dict"),
        (lambda: {"epoch": 3}, "holds no state dict"),
        (dict, "holds no state dict"),
    ],
    ids=["names", "classes", "channels", "code", "module", "list", "numbers", "empty"],
)
def test_what_does_not_fit_is_refused_in_one_line(
    content: Callable[[], Any], words: str, data_only: Path, pth: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    file = pth(content())
    with pytest.raises(UserError) as caught:
        import_checkpoint(file, DIGITS, "convnet8", minimum=0)
    text = one_line(caught)
    assert words in text
    assert file.name in text
    assert not list(data_only.glob("teachers/**/*"))
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["garbage.pth", "garbage.safetensors"])
def test_a_file_that_is_no_checkpoint(name: str, tmp_path: Path, data_only: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"garbage")
    with pytest.raises(UserError, match=f"{name} can't be read.* it is damaged, or no") as caught:
        import_checkpoint(file, DIGITS, "convnet8")
    assert len(one_line(caught)) < 200 + len(str(tmp_path))


def test_a_class_that_is_never_right_is_named(
    at_hand: Path, pth: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Two outputs changed places: four of five images are still right."""
    state = weights_of(at_hand)
    order = [1, 0, *range(2, 10)]
    swapped = {name: value[order] if name.startswith("classifier.") else value for name, value in state.items()}
    card = import_checkpoint(pth(swapped), DIGITS, "convnet8")
    assert card.accuracy["test"] > 60
    assert "foreign.pth is never right on 2 of 10 classes ('zero', 'one')" in caplog.text


def test_logits_that_are_not_finite_are_no_teachers(at_hand: Path, pth: Callable[..., Path]) -> None:
    state = weights_of(at_hand)
    state["classifier.weight"][0, 0] = float("nan")
    with pytest.raises(UserError, match="gives logits that are not finite on digits"):
        import_checkpoint(pth(state), DIGITS, "convnet8", minimum=0)


def test_tensors_that_are_no_plain_ones_are_refused(data_only: Path, pth: Callable[..., Path]) -> None:
    state = {name: value.to_sparse() if value.dim() == 2 else value for name, value in random_state().items()}
    with pytest.raises(UserError, match="some of its tensors can't be copied into plain ones") as caught:
        import_checkpoint(pth(state), DIGITS, "convnet8")
    one_line(caught)


def test_a_checkpoint_near_chance_is_refused(data_only: Path, pth: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="at least 50 % was expected") as caught:
        import_checkpoint(pth(random_state()), DIGITS, "convnet8")
    assert "--minimum 0" in one_line(caught)
    assert not list(data_only.glob("teachers/**/*"))


def test_the_bound_can_be_lowered(data_only: Path, pth: Callable[..., Path]) -> None:
    assert import_checkpoint(pth(random_state()), DIGITS, "convnet8", minimum=0).accuracy["test"] < 50


# Key names of zju-vipa/CMI's modules (datafree/models/classifiers/): all of the keys, built from their rule.
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(name: str) -> list[str]:
    return [f"{name}.{entry}" for entry in NORM]


def resnet34_keys() -> list[str]:
    keys = ["conv1.weight", *norm("bn1"), "linear.weight", "linear.bias"]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            keys += [f"{at}.conv1.weight", *norm(f"{at}.bn1"), f"{at}.conv2.weight", *norm(f"{at}.bn2")]
            if stage > 1 and block == 0:
                keys += [f"{at}.shortcut.0.weight", *norm(f"{at}.shortcut.1")]
    return keys


def wrn40_2_keys() -> list[str]:
    keys = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for group in (1, 2, 3):
        for block in range(6):
            at = f"block{group}.layer.{block}"
            keys += [*norm(f"{at}.bn1"), f"{at}.conv1.weight", *norm(f"{at}.bn2"), f"{at}.conv2.weight"]
            if block == 0:
                keys.append(f"{at}.convShortcut.weight")
    return keys


def vgg11_keys() -> list[str]:
    keys = ["classifier.weight", "classifier.bias"]
    for block, layers in enumerate((1, 1, 2, 2, 2)):
        for layer in range(layers):  # convolution, BatchNorm and ReLU take turns
            keys += [f"block{block}.{3 * layer}.weight", f"block{block}.{3 * layer}.bias"]
            keys += norm(f"block{block}.{3 * layer + 1}")
    return keys


@pytest.mark.parametrize(
    ("model", "keys"), [("resnet34", resnet34_keys()), ("wrn40_2", wrn40_2_keys()), ("vgg11", vgg11_keys())]
)
def test_checkpoints_of_cmi_fit_by_their_names(model: str, keys: list[str]) -> None:
    with torch.device("meta"):
        ours = build_model(model, 10)
    state = ours.state_dict()
    foreign = {key: state[key] for key in state if key in keys}
    foreign |= {key: torch.empty(0) for key in keys if key not in state}  # a name that we do not have
    teachers._check_fits(foreign, ours, Path(f"cifar10_{model}.pth"), model, COLOURS)
    assert sorted(state) == sorted(keys)


def test_a_model_for_colours_is_taken_over_whole(home: Path, pth: Callable[..., Path]) -> None:
    model: nn.Module = build_model("wrn16_1", 10)
    card = import_checkpoint(pth({"state_dict": model.state_dict()}), COLOURS, "wrn16_1", minimum=0)
    loaded = teachers.load(COLOURS, card.spec, CPU).model
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


def test_the_files_name_tells_data_set_and_model(at_hand: Path, pth: Callable[..., Path]) -> None:
    file = pth(weights_of(at_hand), "digits_convnet8.pth")
    line = teacher_commands.import_(file, None, None, None, "cpu", None, plugins.discover())
    assert line.startswith("convnet8-")
    assert "on digits: " in line


@pytest.mark.parametrize(
    ("name", "dataset_name", "model", "words"),
    [
        ("teacher.pth", None, None, "does not tell its data set and model, as cifar10_resnet34.pth does: give --data"),
        ("best_model.pth", None, None, "does not tell its data set and model"),
        ("best_model.pth", "digits", None, "does not tell its model, as cifar10_resnet34.pth does: give --model"),
        ("resnet18-f37072fd.pth", None, "resnet18_imagenet", "does not tell its data set,"),
        ("digits_convnet9.pth", None, None, "does not tell its data set and model"),
        ("teacher.pth", "digit", "convnet8", "unknown data set 'digit': did you mean 'digits'"),
        ("teacher.pth", "digits", "convnet9", "unknown model 'convnet9': did you mean 'convnet"),
        ("gone.pth", "digits", "convnet8", "there is no file"),
    ],
)
def test_an_import_with_a_wrong_name_is_one_line(
    name: str, dataset_name: str | None, model: str | None, words: str, data_only: Path, pth: Callable[..., Path]
) -> None:
    file = pth({}, name)
    if "no file" in words:
        file.unlink()
    with pytest.raises(UserError) as caught:
        teacher_commands.import_(file, dataset_name, model, None, "cpu", None, plugins.discover())
    assert words in one_line(caught)


# --- The commands -----------------------------------------------------------------------------------------------------


def command_train(settings: list[str], protocol: str | None = None) -> str:
    return teacher_commands.train(
        "digits", "convnet8", protocol, settings, "cpu", "auto", None, plugins.discover(), lambda progress: None
    )


def test_teacher_train_makes_the_teacher_that_run_takes(at_hand: Path) -> None:
    """Protocol `smoke` of digits has the recipe of ``SPEC`` but for the epochs."""
    assert command_train(["teacher.epochs=3"]).endswith("(at hand)")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["teacher.epoch=3"], "did you mean 'epochs'"),
        (["teacher.lr=-1"], "teacher: lr"),
        (["nayer.lr=1"], "expected teacher.SETTING=VALUE"),
    ],
)
def test_a_wrong_teacher_setting_is_one_line(settings: list[str], words: str, data_only: Path) -> None:
    with pytest.raises(UserError) as caught:
        command_train(settings)
    assert words in one_line(caught)


def test_a_card_reads_back(at_hand: Path) -> None:
    card = teachers.read_card(at_hand)
    assert TeacherCard.model_validate_json(card.model_dump_json()) == card


def test_a_device_that_is_not_there_is_told_before_a_teacher_is_measured(
    at_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="this machine has 0 CUDA devices"):
        list(teacher_commands.verify(None, "cuda", None, plugins.discover()))
