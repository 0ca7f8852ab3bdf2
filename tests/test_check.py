"""Every built-in method conforms; a method with one thing wrong is caught by the checks meant for it and no others."""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_bench import check, plugins
from dfkd_bench.check.real_run import two_epoch_run
from dfkd_bench.check.whole_runs import works_at_8x8_grey
from dfkd_bench.method import Method
from dfkd_bench.paths import HOME_VARIABLE

PAGE = (Path(__file__).parent.parent / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
FOUND = plugins.discover()

Outcomes = dict[str, check.Outcome]


FIRST_CALL = "images_shape"  # the first check that calls the method


@functools.cache
def outcomes(method: str) -> Outcomes:
    """All outcomes of one discovered method; its checks run once."""
    return {outcome.name: outcome for outcome in check.run_checks(FOUND.source(method), FOUND.method(method))}


def outcomes_of_text(folder: Path, text: str, before: str = "") -> Outcomes:
    """The outcomes of the method in ``text``: all, or those of the checks that come before one."""
    path = folder / "moments.py"
    path.write_text(text, encoding="utf-8")
    source = plugins.method_file(path)
    found = itertools.takewhile(lambda outcome: outcome.name != before, check.run_checks(source, plugins.load(source)))
    return {outcome.name: outcome for outcome in found}


def failed(found: Outcomes) -> dict[str, str]:
    return {name: outcome.detail for name, outcome in found.items() if not outcome.passed}


@pytest.mark.parametrize("name", check.check_names())
@pytest.mark.parametrize("method", sorted(FOUND.methods))
def test_method_conforms(method: str, name: str) -> None:
    outcome = outcomes(method)[name]
    assert outcome.passed, outcome.detail


@pytest.mark.parametrize("method", sorted(FOUND.methods))
def test_outcomes_marked_as_declared_are_the_quirks(method: str) -> None:
    declared = {name for name, outcome in outcomes(method).items() if outcome.declared}
    assert declared == set(FOUND.method(method).quirks)


def test_every_check_says_in_one_line_what_holds() -> None:
    details = [outcome.detail for outcome in outcomes("noise_kd").values()]
    assert all(detail and "\n" not in detail for detail in details)


# --- The page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes_of_text(tmp_path_factory.mktemp("example"), EXAMPLE)


def test_the_example_on_the_page_conforms(example: Outcomes) -> None:
    assert failed(example) == {}


def test_tuning_the_example_makes_no_record_of_it_stale(tmp_path: Path) -> None:
    hashes = set()
    for name, text in (("present", EXAMPLE), ("tuned", EXAMPLE.replace('"pixel_steps": 20}', '"pixel_steps": 40}'))):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        hashes.add(plugins.method_file(tmp_path / f"{name}.py").source_sha256())
    assert len(hashes) == 1


def test_the_page_names_all_that_a_method_may_say() -> None:
    named = set(re.findall(r"(?:[`.]|^)(\w+)", PAGE, re.MULTILINE))
    assert {name for name in vars(Method) if not name.startswith("_")} - named == set()


def test_the_page_names_existing_checks() -> None:
    named = set(re.findall(r"[`\"](\w*_unchanged_by_\w+|resumed_\w+)[`\"]", PAGE))
    assert named
    assert named <= set(check.check_names())


# --- Wrong methods: the example with one thing changed ----------------------------------------------------------------

# Lines of the example before or after which others are put.
INIT = "        self.matcher = BatchNormMatcher(task.teacher)\n"
BODY = "        size = config.synthesis_batch_size\n"
CLASS = '    needs = frozenset({"batchnorm"})\n'
CONFIG = '    """Defaults are ours."""\n'
IMPORTS = "import torch\n"
IMAGES = "Synthesis(pixels.detach().sigmoid(),"
WORKS = ("works_with_many_classes", "works_at_8x8_grey", "works_at_32x32_colour")

WRONG: dict[str, tuple[dict[str, str], set[str]]] = {
    # what is the runner's
    "changes the student's weights": (
        {BODY: BODY + "        student.classifier.bias.data.add_(0.1)\n"},
        {"student_unchanged_by_synthesis"},
    ),
    "moves the student's statistics": (
        {BODY: BODY + "        student.train()(torch.rand(4, *task.image_shape))\n        student.eval()\n"},
        {"student_unchanged_by_synthesis"},
    ),
    "leaves gradients on the student": (
        {BODY: BODY + "        student.classifier.bias.requires_grad_().sum().backward()\n"},
        {"no_gradients_left_on_student"},
    ),
    "trains the student itself": (
        {
            INIT: INIT + "\n    def after_student_step(self, student, batch, at):\n"
            "        student.classifier.bias.data += 1\n"
        },
        {"student_trained_by_runner_only"},
    ),
    "changes the teacher's weights": (
        {INIT: INIT + "        task.teacher.classifier.bias.data.add_(0.1)\n"},
        {"teacher_unchanged", "two_epoch_run"},
    ),
    "changes the teacher's mode": (
        {BODY: BODY + "        task.teacher.classifier.train()\n"},
        {"teacher_mode_unchanged"},
    ),
    "wants the teacher's gradients": (
        {INIT: INIT + "        task.teacher.requires_grad_(True)\n"},
        {"teacher_stays_frozen"},
    ),
    "leaves a hook on the teacher": (
        {INIT: INIT + "        task.teacher.classifier.register_forward_hook(lambda *_: None)\n"},
        {"no_hooks_left"},
    ),
    "leaves a hook on the student": (
        {BODY: BODY + "        student.classifier.register_forward_pre_hook(lambda *_: None)\n"},
        {"no_hooks_left"},
    ),
    "seeds torch": (
        {BODY: BODY + "        torch.manual_seed(0)\n"},
        {"seeds_left_alone"},
    ),
    "opens training files": (
        {BODY: BODY + "        __import__('sklearn.datasets').datasets.load_digits()\n"},
        {"no_data_file_opened", "two_epoch_run"},
    ),
    # images
    "images outside of [0, 1]": ({IMAGES: "Synthesis(pixels.detach() * 3,"}, {"images_in_range"}),
    "images with a graph": ({IMAGES: "Synthesis(pixels.sigmoid(),"}, {"images_detached"}),
    "infinite images": ({IMAGES: "Synthesis(pixels.detach().sigmoid() / 0,"}, {"images_finite", *WORKS}),
    "bytes for images": (
        {IMAGES: "Synthesis(pixels.detach().sigmoid().round().to(torch.uint8),"},
        {"images_shape", "two_epoch_run"},
    ),
    "extras without a row for each image": (
        {
            INIT: INIT + "\n    def student_batch(self, pool, size, at):\n"
            "        return replace(super().student_batch(pool, size, at), extras={'labels': torch.zeros(3)})\n",
            IMPORTS: "from dataclasses import replace\n" + IMPORTS,
        },
        {"extras_have_rows"},
    ),
    "a scalar with a dimension": (
        {"loss.detach()}": "loss.detach().reshape(1)}"},
        {"scalars_are_tensors"},
    ),
    "needs fewer classes than images": (
        {"labels = torch.randint(task.num_classes, (size,)": "labels = torch.randint(size - task.num_classes, (size,)"},
        {"works_with_many_classes"},
    ),
    "knows 8x8 grey images only": (
        {"*task.image_shape": "1, 8, 8"},
        {"works_at_32x32_colour"},
    ),
    # the student's steps
    "batches larger than asked for": (
        {
            INIT: INIT + "\n    def student_batch(self, pool, size, at):\n"
            "        return Batch(self.task.normalize(pool.draw(size)).repeat(2, 1, 1, 1))\n",
            IMPORTS: IMPORTS + "from dfkd_bench.method import Batch\n",
        },
        {"student_batch_size", "batch_rows_are_right"},
    ),
    "batches that are not normalised": (
        {
            INIT: INIT + "\n    def student_batch(self, pool, size, at):\n"
            "        return Batch(self.task.normalize(self.task.normalize(pool.draw(size))))\n",
            IMPORTS: IMPORTS + "from dfkd_bench.method import Batch\n",
        },
        {"student_batch_range"},
    ),
    "batches with a graph": (
        {
            INIT: INIT + "\n    def student_batch(self, pool, size, at):\n"
            "        return Batch(self.task.normalize(pool.draw(size).requires_grad_()))\n",
            IMPORTS: IMPORTS + "from dfkd_bench.method import Batch\n",
        },
        {"student_batch_detached"},
    ),
    "a loss that trains the last layer only": (
        {
            INIT: INIT + "\n    def student_loss(self, student, batch, at):\n"
            "        return student.classifier(student.features(batch.images)[1].detach()).square().mean()\n"
        },
        {"student_loss_reaches_the_student"},
    ),
    "an infinite loss": (
        {
            INIT: INIT + "\n    def student_loss(self, student, batch, at):\n"
            "        return super().student_loss(student, batch, at) / 0\n"
        },
        {"student_loss_finite", "two_epoch_run", *WORKS},
    ),
    # seeds and state
    "draws from the system": (
        {IMAGES: "Synthesis((pixels.detach() + __import__('os').urandom(1)[0] / 255).sigmoid(),"},
        {"same_seed_same_bits", "resumed_run_is_the_same"},
    ),
    "state falsely called transient": (
        {
            CLASS: CLASS + "    transient = frozenset({'calls'})\n",
            INIT: INIT + "        self.calls = 0\n",
            BODY: BODY + "        self.calls += 1\n",
            IMAGES: "Synthesis((pixels.detach() + self.calls).sigmoid(),",
        },
        {"resumed_run_is_the_same"},
    ),
    "state left out of state_dict": (
        {
            INIT: INIT + "        self.calls = 0\n\n    def state_dict(self):\n        return {}\n\n"
            "    def load_state_dict(self, state):\n        pass\n",
            BODY: BODY + "        self.calls += 1\n",
            IMAGES: "Synthesis((pixels.detach() + self.calls).sigmoid(),",
        },
        {"resumed_run_is_the_same"},
    ),
    "state in a module's global": (
        {
            IMPORTS: IMPORTS + "\nCALLS = []\n",
            BODY: BODY + "        CALLS.append(1)\n",
            IMAGES: "Synthesis((pixels.detach() + len(CALLS) / 1000).sigmoid(),",
        },
        {"same_seed_same_bits", "resumed_run_is_the_same"},
    ),
    "state that can't be saved": (
        {INIT: INIT + "        self.seen = {0}\n"},
        {"state_can_be_saved", "resumed_run_is_the_same", "two_epoch_run"},
    ),
    "a transient attribute that is not there": (
        {CLASS: CLASS + "    transient = frozenset({'nothing'})\n"},
        {"state_can_be_saved"},
    ),
    "a quirk that does not happen": (
        {CLASS: CLASS + "    quirks = {'student_unchanged_by_synthesis': 'as released'}\n"},
        {"student_unchanged_by_synthesis"},
    ),
    "a default outside of its own bounds": (
        {"Field(0.5, ge=0": "Field(0.5, ge=1"},
        {"config_json_round_trip", "generation_cost_is_counted", "two_epoch_run"},
    ),
}

# What can be told from the file; only the checks before the first call of the method are run.
WRONG_FILES: dict[str, tuple[dict[str, str], set[str]]] = {
    "unknown settings accepted": (
        {CONFIG: CONFIG + "    model_config = {'extra': 'ignore'}\n"},
        {"unknown_setting_refused"},
    ),
    "settings that can be changed": (
        {CONFIG: CONFIG + "    model_config = {'frozen': False}\n"},
        {"config_frozen"},
    ),
    "a setting without default": (
        {
            CONFIG: CONFIG + "    depth: int = Field(description='layers')\n",
            "tiny: ClassVar = {": "tiny: ClassVar = {'depth': 1, ",
        },
        {"config_default_constructible", "config_json_round_trip", "own_settings_parse"},
    ),
    "a setting without description": (
        {CONFIG: CONFIG + "    depth: int = 1\n"},
        {"settings_described"},
    ),
    "a setting with a name of the schedule's": (
        {CONFIG: CONFIG + "    lr: float = Field(0.1, description='step')\n"},
        {"settings_are_not_the_schedules"},
    ),
    "smoke settings that don't parse": ({'config={"pixel_steps"': 'config={"pixel_step"'}, {"own_settings_parse"}),
    "a card without knowledge": ({'    "knowledge": "none",\n': ""}, {"card_complete"}),
    "a card that must be run": ({'"year": 2020': '"year": int(2020)'}, {"card_complete"}),
    "no link": ({"https://arxiv.org/abs/1912.08795": "2019"}, {"docstring_link"}),
    "no differences from the code": ({"Differences from the released code": "Code"}, {"docstring_differences"}),
    "asks for training data": (
        {CLASS: '    needs = frozenset({"batchnorm", "training_data"})\n'},
        {"training_data_for_controls_only"},
    ),
    "needs what there is not": ({CLASS: '    needs = frozenset({"batchnorms"})\n'}, {"needs_known"}),
    "a quirk of no check": (
        {CLASS: CLASS + "    quirks = {'student_unchanged': 'as released'}\n"},
        {"quirks_known"},
    ),
}


def changed(edits: dict[str, str]) -> str:
    text = EXAMPLE
    for old, new in edits.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_method_is_caught(wrong: str, tmp_path: Path) -> None:
    edits, expected = WRONG[wrong]
    found = failed(outcomes_of_text(tmp_path, changed(edits)))
    assert set(found) == expected, found


def test_images_and_extras_are_looked_at_before_the_pool_refuses_them(tmp_path: Path) -> None:
    found = outcomes_of_text(
        tmp_path, changed({IMAGES: "Synthesis(pixels.detach()[:, :, 1:], {'labels': labels[1:]},"})
    )
    assert found["images_shape"].detail == "images have shape [8, 1, 7, 8], expected [n, 1, 8, 8]"
    assert found["extras_have_rows"].detail == "extra 'labels' of a synthesis has shape [7], expected 8 rows"


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_file_is_caught(wrong: str, tmp_path: Path) -> None:
    edits, expected = WRONG_FILES[wrong]
    found = failed(outcomes_of_text(tmp_path, changed(edits), before=FIRST_CALL))
    assert set(found) == expected, found


def test_a_declared_break_that_happens_passes_with_its_reason(tmp_path: Path) -> None:
    edits = {
        CLASS: CLASS + "    quirks = {'images_in_range': 'the released code adds noise'}\n",
        IMAGES: "Synthesis(pixels.detach() * 3,",
    }
    outcome = outcomes_of_text(tmp_path, changed(edits), before="images_detached")["images_in_range"]
    assert (outcome.passed, outcome.declared) == (True, True)
    assert "the released code adds noise" in outcome.detail


def test_an_error_is_no_declared_break(tmp_path: Path) -> None:
    edits = {
        CLASS: CLASS + "    quirks = {'images_in_range': 'the released code adds noise'}\n",
        BODY: BODY + "        raise KeyError('x')\n",
    }
    outcome = outcomes_of_text(tmp_path, changed(edits), before="images_detached")["images_in_range"]
    assert (outcome.passed, outcome.detail) == (False, "KeyError: 'x' (moments.py:60)")


def test_sys_exit_is_an_error_like_others(tmp_path: Path) -> None:
    found = outcomes_of_text(tmp_path, changed({BODY: BODY + "        raise SystemExit(3)\n"}))
    assert tuple(found) == check.check_names()
    assert found["images_shape"].detail.startswith("SystemExit: 3 (moments.py:")


def test_errors_become_one_line_each(tmp_path: Path) -> None:
    found = outcomes_of_text(tmp_path, changed({INIT: INIT + "        raise RuntimeError('no memory\\nat all')\n"}))
    assert found["images_shape"].detail == "RuntimeError: no memory (moments.py:55)"
    assert tuple(found) == check.check_names()


def test_a_method_that_supports_less_says_so(tmp_path: Path) -> None:
    unsupported = (
        "\n    @classmethod\n    def unsupported(cls, config, task):\n"
        "        return None if task.image_shape[1] >= 32 else 'images are too small'\n"
    )
    path = tmp_path / "moments.py"
    path.write_text(changed({INIT: INIT + unsupported}), encoding="utf-8")
    source = plugins.method_file(path)
    subject = check.Subject(source, plugins.load(source))
    assert subject.bench().case == check.LARGE
    works_at_8x8_grey(subject)
    two_epoch_run(subject)


def test_a_method_that_supports_nothing_fails(tmp_path: Path) -> None:
    unsupported = "\n    @classmethod\n    def unsupported(cls, config, task):\n        return 'not today'\n"
    found = failed(outcomes_of_text(tmp_path, changed({INIT: INIT + unsupported})))
    assert found["images_shape"] == "the method supports neither 8x8 nor 32x32 images: not today"


def test_label_text_embeddings_from_a_file_are_no_data_file_of_the_method(tmp_path: Path) -> None:
    np.save(tmp_path / "embeddings.npy", np.eye(check.FAKE.num_classes, dtype=np.float32))
    nayer = FOUND.method("nayer")
    tiny = {**nayer.tiny, "encoder": f"file:{tmp_path / 'embeddings.npy'}"}
    subject = check.Subject(FOUND.source("nayer"), type("Nayer", (nayer,), {"tiny": tiny}))
    two_epoch_run(subject)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(check.run_checks(FOUND.source("noise_kd"), FOUND.method("noise_kd")))
    assert torch.equal(torch.get_rng_state(), before)
    assert os.environ[HOME_VARIABLE] == str(tmp_path / "home")
    assert not (tmp_path / "home").exists()
    assert not [name for name in sys.modules if name.startswith("dfkd_bench_plugin_fake_data")]
