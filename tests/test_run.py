"""One job from start to record: outcomes, counters, what may be opened, and resuming after a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dfkd_bench import data, plugins, teachers
from dfkd_bench.checkpoint import Pace, load_tree, save_tree
from dfkd_bench.compute import Compute
from dfkd_bench.engines import local, server
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job
from dfkd_bench.lease import Busy
from dfkd_bench.paths import HOME_VARIABLE, home
from dfkd_bench.pool import Pool
from dfkd_bench.record import DataFolder, Record, read, record_path
from dfkd_bench.report import table as tables
from dfkd_bench.run import EpochDone, Place, failed, run, stream_seed
from dfkd_bench.runfolder import RunFolder
from dfkd_bench.suite import expand, make_suite

TINY = {
    "teacher.epochs": 2,
    "nayer.epochs": 4,
    "nayer.warmup_epochs": 1,
    "nayer.student_steps": 3,
    "nayer.batch_size": 16,
    "nayer.synthesis_batch_size": 12,
    "nayer.generator_steps": 2,
    "nayer.warmup_loops": 2,
    "nayer.loops": 2,
    "nayer.noisy_width": 8,
    "nayer.generator_width": 4,
    "nayer.encoder": "random:16",
}
TINY_FM = {
    "fm.epochs": 4,
    "fm.warmup_epochs": 1,
    "fm.student_steps": 3,
    "fm.batch_size": 16,
    "fm.synthesis_batch_size": 12,
    "fm.generator_steps": 2,
    "fm.latent_dim": 8,
    "fm.generator_width": 4,
    "fm.reset_epoch": 2,
}

FAILING = '''
"""A method that fails in its second epoch."""
from dfkd_bench.method import Method, MethodConfig, Synthesis
import torch

class Failing(Method):
    Config = MethodConfig
    def synthesize(self, student, at):
        if at.epoch == 1:
            raise ZeroDivisionError("no luck")
        return Synthesis(torch.rand(8, *self.task.image_shape))
'''

PEEKING = '''
"""A method that reads real images while it runs."""
from dfkd_bench.method import Method, MethodConfig, Synthesis
import torch

class Peeking(Method):
    Config = MethodConfig
    def synthesize(self, student, at):
        from sklearn.datasets import load_digits
        images = torch.from_numpy(load_digits().images[:16]).float().view(16, 1, 8, 8) / 16
        return Synthesis(images)
'''

NOISE = '''
"""A method that hands over noise."""
from dfkd_bench.method import Method, MethodConfig, Synthesis
import torch

class Noise(Method):
    Config = MethodConfig
    def synthesize(self, student, at):
        {}
        return Synthesis(torch.rand(8, *self.task.image_shape))
'''


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with digits and a teacher of two epochs."""
    place = tmp_path_factory.mktemp("home")
    before = os.environ.get(HOME_VARIABLE)
    os.environ[HOME_VARIABLE] = str(place)
    torch.set_num_threads(1)
    dataset = data.dataset("digits")
    spec = jobs_of("nayer")[0].teacher
    teachers.train(dataset, spec, Compute(torch.device("cpu")))
    yield place
    if before is None:
        del os.environ[HOME_VARIABLE]
    else:
        os.environ[HOME_VARIABLE] = before


@pytest.fixture
def fresh(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own with the same data and teacher."""
    place = tmp_path / "home"
    shutil.copytree(prepared, place, ignore=shutil.ignore_patterns("runs"))
    monkeypatch.setenv(HOME_VARIABLE, str(place))
    return place


def jobs_of(method: str, files: tuple[Path, ...] = (), **changes: object) -> list[Job]:
    tiny = {"nayer": TINY, "fm": {**TINY_FM, "teacher.epochs": 2}}.get(method, {"teacher.epochs": 2})
    schedule = {} if method in ("nayer", "fm") else {f"{method}.epochs": 3, f"{method}.warmup_epochs": 0}
    schedule |= {} if method in ("nayer", "fm") else {f"{method}.student_steps": 2, f"{method}.batch_size": 16}
    settings = {**tiny, **schedule, **{f"{method}.{name}": value for name, value in changes.items()}}
    suite = make_suite("test", "test", "digits", [method], pairs=["convnet8:convnet8"], controls=(), settings=settings)
    return expand(suite, plugins.discover(files), data.dataset("digits"), "cpu", "fp32")


def run_it(method: str, output: Path, files: tuple[Path, ...] = (), **changes: object) -> Record:
    (job,) = jobs_of(method, files, **changes)
    return run(job, Place(output, plugin_files=files, device="cpu"))


def student_of(record: Record) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(home() / "runs" / record.job_id / "student.safetensors")


def plugin(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_a_run_leaves_a_record_that_reads_back(fresh: Path, tmp_path: Path) -> None:
    record = run_it("nayer", tmp_path)
    assert read(record_path(tmp_path, record.job)) == record


def test_the_runner_counts_what_the_settings_promise(fresh: Path, tmp_path: Path) -> None:
    counters = run_it("nayer", tmp_path).counters
    batches = 1 * 2 + 3 * 2  # one warm-up epoch and three others, two loops each
    assert counters.images_made == batches * 12
    assert (counters.generator_steps, counters.teacher_images) == (batches * 2, batches * 2 * 12)
    assert counters.student_steps == 3 * 3
    assert counters.extra_rows == 0


def test_the_curve_begins_after_the_warm_up(fresh: Path, tmp_path: Path) -> None:
    record = run_it("nayer", tmp_path)
    assert [point.epoch for point in record.curve] == [1, 2, 3]
    assert record.last is not None
    assert record.last.epoch == 3


def test_only_test_files_are_opened_and_none_by_the_method(fresh: Path, tmp_path: Path) -> None:
    record = run_it("nayer", tmp_path)
    names = {Path(file.path).name for file in record.files if "digits" in file.path}
    assert names == {"test-images.npy", "test-labels.npy", "test-index.json"}
    assert {file.phase for file in record.files} == {"runner"}


def test_controls_say_that_they_read_training_images(fresh: Path, tmp_path: Path) -> None:
    record = run_it("real_kd", tmp_path)
    assert "train-images.npy" in {Path(file.path).name for file in record.files}


def test_a_folder_that_is_lent_is_one_entry_of_record_and_checkpoint(fresh: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for number in range(20):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(pool / f"{number}.png")
    (job,) = jobs_of("ood_kd", pool=f"folder:{pool}")

    def stop(done: EpochDone) -> None:
        if done.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, Place(tmp_path, device="cpu"), stop)
    saved = load_tree(RunFolder(job).path / "checkpoint" / "state.safetensors")
    assert not [path for path, _ in saved["state"]["files"] if path.endswith(".png")]
    written = read(record_path(tmp_path, run(job, Place(tmp_path, device="cpu")).job))
    folders = [entry for entry in written.files if isinstance(entry, DataFolder)]
    assert [(Path(entry.path).name, entry.files, entry.digest) for entry in folders] == [
        ("pool", 20, job.inputs["pool"])
    ]
    assert not [entry for entry in written.files if entry.path.endswith(".png")]


def test_a_method_that_opens_data_files_fails(fresh: Path, tmp_path: Path) -> None:
    record = run_it("peeking", tmp_path, (plugin(tmp_path, "peeking", PEEKING),))
    assert record.status == "failed"
    assert record.reason is not None
    assert "opened data files" in record.reason


def test_an_exception_becomes_a_failed_record(fresh: Path, tmp_path: Path) -> None:
    record = run_it("failing", tmp_path, (plugin(tmp_path, "failing", FAILING),))
    assert (record.status, record.reason) == ("failed", "ZeroDivisionError: no luck (failing.py:10)")
    assert "Traceback" in (RunFolder(record.job).path / "log.txt").read_text()


def test_sys_exit_of_a_method_is_a_failed_record_with_a_reason(fresh: Path, tmp_path: Path) -> None:
    record = run_it("leaving", tmp_path, (plugin(tmp_path, "leaving", NOISE.format("raise SystemExit(0)")),))
    assert (record.status, record.reason) == ("failed", "SystemExit: 0 (leaving.py:9)")


def test_a_raw_file_of_the_data_set_counts_as_data_whatever_its_name(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = replace(data.dataset("digits"), raw=data.Raw(("digits/train",)))
    path = tmp_path / "root" / "digits" / "train"
    path.parent.mkdir(parents=True)
    path.touch()
    files = (plugin(tmp_path, "reading", NOISE.format(f"open({str(path)!r}).close()")),)
    (job,) = jobs_of("reading", files)
    monkeypatch.setattr(data, "dataset", lambda *_: digits)
    record = run(job, Place(tmp_path, data_root=tmp_path / "root", plugin_files=files, device="cpu"))
    assert record.reason == "NotDataFree: the method opened data files while it ran: $DFKD_BENCH_DATA/digits/train"


def test_a_loss_that_is_not_finite_is_an_outcome(fresh: Path, tmp_path: Path) -> None:
    record = run_it("nayer", tmp_path, lr=1e30)
    assert (record.status, record.outcome) == ("done", "not finite")
    assert record.curve[-1].loss is None


def test_images_that_are_not_finite_or_in_range_are_counted(fresh: Path, tmp_path: Path) -> None:
    """The pool's 8 bits hide them: black, or clamped."""
    bad = "return Synthesis(torch.rand(8, *self.task.image_shape) * (float('nan') if at.epoch % 2 else 2))"
    record = run_it("diverging", tmp_path, (plugin(tmp_path, "diverging", NOISE.format(bad)),))
    counted = record.counters
    assert 0 < counted.images_not_finite < counted.images_made
    assert counted.images_not_finite + counted.images_clamped == counted.images_made
    table = tables.build([record], "t")
    assert any("images were not finite: black in the pool (seed 0)" in line for line in table.rows[-1].remarks)
    assert any("images were not in [0, 1] (seed 0)" in line for line in table.rows[-1].remarks)


def test_a_method_that_changes_the_teacher_fails(fresh: Path, tmp_path: Path) -> None:
    change = "self.task.teacher.classifier.weight.data.mul_(1.01)"
    record = run_it("changing", tmp_path, (plugin(tmp_path, "changing", NOISE.format(change)),))
    assert record.status == "failed"
    assert str(record.reason).startswith("TeacherChanged: the method has changed the teacher's weights or buffers")


def test_bytes_for_images_are_refused(fresh: Path, tmp_path: Path) -> None:
    wrong = "return Synthesis(torch.zeros(8, *self.task.image_shape, dtype=torch.uint8))"
    record = run_it("bytes_", tmp_path, (plugin(tmp_path, "bytes_", NOISE.format(wrong)),))
    assert record.reason == "TypeError: `synthesize` returned images of torch.uint8, expected floats in [0, 1]"


def test_a_student_at_chance_is_called_collapsed(fresh: Path, tmp_path: Path) -> None:
    record = run_it("nayer", tmp_path, lr=1e-9)
    assert (record.status, record.outcome) == ("done", "collapsed")


def test_the_pool_keeps_to_its_cap(fresh: Path, tmp_path: Path) -> None:
    record = run_it("nayer", tmp_path, pool_cap=20)
    assert record.status == "done"
    assert record.counters.images_made == 96


def test_a_run_that_somebody_else_has_is_left_alone(fresh: Path, tmp_path: Path) -> None:
    (job,) = jobs_of("nayer")
    with RunFolder(job).lease(), pytest.raises(Busy):
        run(job, Place(tmp_path, device="cpu"))


@pytest.mark.parametrize("fault", ["pass", "if at.epoch == 1: raise MemoryError"], ids=["no error", "error"])
def test_a_run_that_was_taken_over_ends_without_a_record(fault: str, fresh: Path, tmp_path: Path) -> None:
    files = (plugin(tmp_path, "noise", NOISE.format(fault)),)
    (job,) = jobs_of("noise", files)
    folder = RunFolder(job)

    def take(done: EpochDone) -> None:
        if done.epoch == 1:
            (folder.path / "lease").write_text('{"host": "another-host", "pid": 1}')

    with pytest.raises(Busy, match="taken over"):
        run(job, Place(tmp_path, plugin_files=files, device="cpu"), take)
    assert not record_path(tmp_path, job).exists()
    assert not (folder.path / "log.txt").exists()
    assert (folder.path / "lease").exists()


@pytest.mark.parametrize("method", ["nayer", "fm"])
def test_same_seed_same_bits(method: str, fresh: Path, tmp_path: Path) -> None:
    first = run_it(method, tmp_path / "a")
    weights = student_of(first)
    shutil.rmtree(home() / "runs")
    second = run_it(method, tmp_path / "b")
    again = student_of(second)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_students_of_all_methods_start_alike() -> None:
    assert stream_seed(3, "student") == stream_seed(3, "student")
    assert stream_seed(3, "student") != stream_seed(4, "student")
    assert stream_seed(3, "student") != stream_seed(3, "pool")


@pytest.mark.parametrize("method", ["fm", "real_kd", "scratch"])
def test_same_bits_where_images_do_not_fit_on_the_device(
    method: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_it(method, tmp_path / "a")
    student = student_of(first)
    monkeypatch.setattr(teachers, "labelled", partial(teachers.labelled, spare=lambda _: 0))
    second = run_it(method, tmp_path / "b")
    assert (second.last, second.diversity) == (first.last, first.diversity)
    assert all(torch.equal(value, student[name]) for name, value in student_of(second).items())


@pytest.mark.parametrize("method", ["nayer", "fm", "real_kd"])
def test_an_interrupted_run_ends_bit_identical(method: str, fresh: Path, tmp_path: Path) -> None:
    whole = run_it(method, tmp_path / "whole")
    weights = student_of(whole)
    shutil.rmtree(home() / "runs")
    (job,) = jobs_of(method)

    def stop(done: EpochDone) -> None:
        if done.epoch == 3:  # the checkpoint after epoch 2 is the last one
            raise KeyboardInterrupt

    place = Place(tmp_path / "parts", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(job, place, stop)
    resumed = run(job, place)
    assert resumed.resumes == 1
    assert [point.accuracy for point in resumed.curve] == [point.accuracy for point in whole.curve]
    assert resumed.counters == whole.counters
    assert all(torch.equal(weights[name], tensor) for name, tensor in student_of(resumed).items())


def test_a_run_whose_checkpoints_take_long_has_fewer_and_ends_bit_identical(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with CMI's bank, which is rewritten whole: 195 GB in a run of the published length."""
    (job,) = jobs_of("fm", epochs=8)
    whole = run(job, Place(tmp_path / "whole", device="cpu"))
    weights = student_of(whole)
    shutil.rmtree(home() / "runs")
    now, save, saved = [0.0], RunFolder.save, list[int]()

    def slow(folder: RunFolder, state: dict[str, Any], pool: Pool) -> None:
        saved.append(state["epoch"])
        save(folder, state, pool)
        now[0] += 3

    def stop_in_the_seventh_epoch(done: EpochDone) -> None:
        now[0] += 25
        if done.epoch == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", slow)
    monkeypatch.setattr("dfkd_bench.run.Pace", lambda: Pace(lambda: now[0]))
    place = Place(tmp_path / "parts", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(job, place, stop_in_the_seventh_epoch)
    assert saved == [1, 4]
    resumed = run(job, place)
    assert [point.accuracy for point in resumed.curve] == [point.accuracy for point in whole.curve]
    assert resumed.counters == whole.counters
    assert all(torch.equal(weights[name], tensor) for name, tensor in student_of(resumed).items())


def interrupted(folder: Path) -> tuple[Job, Place]:
    """A run of three epochs that was stopped in its second."""
    files = (plugin(folder, "noise", NOISE.format("pass")),)
    (job,), place = jobs_of("noise", files), Place(folder, plugin_files=files, device="cpu")

    def stop(done: EpochDone) -> None:
        if done.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, place, stop)
    return job, place


def change_maker(job: Job, **changes: str) -> None:
    """As if something else had made the checkpoint."""
    path = RunFolder(job).path / "checkpoint" / "state.safetensors"
    saved = load_tree(path)
    saved["state"]["made_by"] |= changes
    save_tree(path, saved)


@pytest.mark.parametrize("maker", ["source", "teacher"])
def test_a_checkpoint_of_other_code_or_another_teacher_is_not_gone_on_with(
    maker: str, fresh: Path, tmp_path: Path
) -> None:
    job, place = interrupted(tmp_path)
    change_maker(job, **{maker: "another"})
    record = run(job, place)
    assert (record.resumes, [point.epoch for point in record.curve]) == (0, [0, 1, 2])


def test_a_checkpoint_that_names_the_same_code_by_the_earlier_rule_is_gone_on_with(fresh: Path, tmp_path: Path) -> None:
    job, place = interrupted(tmp_path)
    source = plugins.discover(place.plugin_files).source("noise")
    (earlier,) = source.same_code() - {source.source_sha256()}
    change_maker(job, source=earlier)
    assert run(job, place).resumes == 1


def test_a_checkpoint_of_another_device_is_kept_and_told(fresh: Path, tmp_path: Path) -> None:
    job, place = interrupted(tmp_path)
    change_maker(job, device="cuda")
    with pytest.raises(UserError, match=r"give --device cuda, or delete \S+ to start it anew$"):
        run(job, place)
    assert RunFolder(job).has_checkpoint


def test_metrics_have_each_epoch_once_after_a_kill(fresh: Path, tmp_path: Path) -> None:
    """An epoch's line is written before its checkpoint, and the epoch comes again if there is none."""
    job, place = interrupted(tmp_path)
    path = RunFolder(job).path / "metrics.jsonl"
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]  # the checkpoint: one epoch
    record = run(job, place)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        point.model_dump() for point in record.curve
    ]


def change_state(job: Job, **changes: object) -> None:
    path = RunFolder(job).path / "checkpoint" / "state.safetensors"
    saved = load_tree(path)
    saved["state"] |= changes
    save_tree(path, saved)


def test_a_run_that_goes_on_elsewhere_names_both_machines_and_the_higher_peak(fresh: Path, tmp_path: Path) -> None:
    job, place = interrupted(tmp_path)
    (here,) = load_tree(RunFolder(job).path / "checkpoint" / "state.safetensors")["state"]["hardware"]
    other = here | {"cpu": "Another CPU"}
    change_state(job, hardware=[other], peak_memory=10**15)
    record = run(job, place)
    assert (record.earlier_hardware, record.hardware, record.peak_memory) == ((other,), here, 10**15)


def test_a_run_that_goes_on_on_the_same_machine_has_one(fresh: Path, tmp_path: Path) -> None:
    job, place = interrupted(tmp_path)
    record = run(job, place)
    assert (record.resumes, record.earlier_hardware) == (1, ())


def test_a_checkpoint_that_names_no_machine_is_gone_on_with(fresh: Path, tmp_path: Path) -> None:
    """Those of earlier versions."""
    job, place = interrupted(tmp_path)
    path = RunFolder(job).path / "checkpoint" / "state.safetensors"
    saved = load_tree(path)
    del saved["state"]["hardware"], saved["state"]["peak_memory"]
    save_tree(path, saved)
    record = run(job, place)
    assert (record.status, record.resumes, record.earlier_hardware) == ("done", 1, ())


def test_a_failed_run_goes_on_where_it_failed(fresh: Path, tmp_path: Path) -> None:
    once = "if at.epoch == 1 and not vars(type(self)).get('failed'): type(self).failed = True; raise MemoryError"
    files = (plugin(tmp_path, "unlucky", NOISE.format(once)),)
    assert run_it("unlucky", tmp_path, files).status == "failed"
    record = run_it("unlucky", tmp_path, files)
    assert (record.status, record.resumes) == ("done", 1)


def test_a_record_that_another_command_has_made_meanwhile_is_taken(fresh: Path, tmp_path: Path) -> None:
    files = (plugin(tmp_path, "noise", NOISE.format("pass")),)
    made = run_it("noise", tmp_path, files)
    epochs: list[int] = []
    again = run(made.job, Place(tmp_path, plugin_files=files, device="cpu"), lambda done: epochs.append(done.epoch))
    assert (again, epochs) == (made, [])


@pytest.mark.parametrize(("edited", "repeated"), [(False, False), (True, True)])
def test_a_failed_record_that_another_task_has_made_meanwhile_stands(
    edited: bool, repeated: bool, fresh: Path, tmp_path: Path
) -> None:
    """Each task of an array did every failed run once more."""
    path = plugin(tmp_path, "failing", FAILING)
    made = run_it("failing", tmp_path, (path,))
    if edited:  # then it is no failure of today's code
        path.write_text(FAILING.replace("no luck", "no luck again"))
    place, epochs = Place(tmp_path, plugin_files=(path,), device="cpu", keep_failed=True), list[int]()
    again = run(made.job, place, lambda done: epochs.append(done.epoch))
    assert bool(epochs) is repeated
    assert repeated or again == made


def test_the_record_is_of_the_code_that_ran(fresh: Path, tmp_path: Path) -> None:
    path = plugin(tmp_path, "noise", NOISE.format("pass"))
    before = plugins.discover((path,)).source("noise").source_sha256()
    (job,) = jobs_of("noise", (path,))
    place = Place(tmp_path, plugin_files=(path,), device="cpu")
    record = run(job, place, lambda done: path.write_text(NOISE.format("edited = True")) and None)
    assert record.method.source_sha256 == before


@pytest.mark.parametrize("edited", [NOISE + "\nCARD = {{'knowledge': 5}}", "def (:", None])
def test_an_error_is_recorded_whatever_has_become_of_the_file(edited: str | None, fresh: Path, tmp_path: Path) -> None:
    path = plugin(tmp_path, "failing", FAILING)
    found = plugins.discover((path,))
    before = found.source("failing").source_sha256()
    (job,) = jobs_of("failing", (path,))

    def edit(done: EpochDone) -> None:
        if edited is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(edited.format("pass") if "CARD" in edited else edited)

    record = run(job, Place(tmp_path, plugin_files=(path,), device="cpu"), edit)
    assert (record.reason, record.method.source_sha256) == ("ZeroDivisionError: no luck (failing.py:10)", before)
    assert failed(job, found, "it died").knowledge == "not stated"


def test_a_run_whose_method_is_gone_is_a_failed_row(fresh: Path, tmp_path: Path) -> None:
    path = plugin(tmp_path, "failing", FAILING)
    (job,) = jobs_of("failing", (path,))
    record = failed(job, plugins.discover(), "it died")
    assert (record.status, record.reason, record.method.source_sha256) == ("failed", "it died", "")


def test_knowledge_of_the_wrong_type_fails_before_the_work(fresh: Path, tmp_path: Path) -> None:
    says = "    def outside_knowledge(config): return ['none']\n"
    text = NOISE.format("pass").replace("    def syn", f"    @staticmethod\n{says}    def syn")
    files, epochs = (plugin(tmp_path, "noise", text),), list[int]()
    (job,) = jobs_of("noise", files)
    record = run(job, Place(tmp_path, plugin_files=files, device="cpu"), lambda done: epochs.append(done.epoch))
    assert record.reason == "TypeError: outside_knowledge returned a list, expected a text or None"
    assert epochs == []


def test_kill_9_loses_at_most_one_epoch(fresh: Path, tmp_path: Path) -> None:
    """The process is killed for real; the engine starts it again and it ends as if nothing had happened."""
    whole = run_it("nayer", tmp_path / "whole", epochs=40)
    weights = student_of(whole)
    shutil.rmtree(home() / "runs")
    (job,) = jobs_of("nayer", epochs=40)
    epochs: list[int] = []

    def kill(event: local.Event) -> None:
        if event.state != "running":
            return
        epochs.append(event.epoch)
        if event.epoch >= 3 and len(epochs) == epochs.index(event.epoch) + 1 and not killed:
            killed.append(json.loads((home() / "runs" / job.id / "lease").read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    (record,) = local.run_jobs([job], Place(tmp_path / "killed"), ["cpu"], kill)
    assert record is not None
    assert (len(killed), record.status, record.resumes) == (1, "done", 1)
    assert [point.accuracy for point in record.curve] == [point.accuracy for point in whole.curve]
    assert all(torch.equal(weights[name], tensor) for name, tensor in student_of(record).items())


def test_a_process_that_dies_twice_is_a_failed_row(fresh: Path, tmp_path: Path) -> None:
    (job,) = jobs_of("nayer", epochs=500)

    def kill(event: local.Event) -> None:
        if event.state == "running":
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # between two attempts
                lease = home() / "runs" / job.id / "lease"
                os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)

    (record,) = local.run_jobs([job], Place(tmp_path), ["cpu"], kill)
    assert record is not None
    assert record.status == "failed"
    assert "SIGKILL" in (record.reason or "")


def test_a_process_that_ends_without_a_word_did_not_do_its_work() -> None:
    silent = slice  # takes what a child is given, and says nothing
    (reason,) = local._all([None], silent, Place(Path()), ["cpu"], lambda event: None)
    assert reason.startswith("the process ended before its work was done")


def test_a_full_disk_is_no_failed_run(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of("nayer")

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", full)
        with pytest.raises(UserError, match="No space left on device"):
            run(job, Place(tmp_path, device="cpu"))
    assert not record_path(tmp_path, job).exists()
    assert run(job, Place(tmp_path, device="cpu")).status == "done"


@pytest.mark.parametrize(("devices", "imported"), [(["cpu", "cpu"], True), (["cuda:0"], False)])
def test_the_fork_server_counts_no_gpus(devices: list[str], imported: bool) -> None:
    """torch._dynamo does when it is imported; on the CPU it is imported once for all runs."""
    assert ("torch._dynamo" in server.preloaded(devices)) == imported


def test_a_fork_server_that_counts_gpus_is_not_kept_for_runs_on_them() -> None:
    server.start(["cpu"])
    first = forkserver._forkserver._forkserver_pid
    server.start(["cpu"])
    assert forkserver._forkserver._forkserver_pid == first
    server.start(["cuda:0"])
    assert forkserver._forkserver._forkserver_pid != first
    server.stop()


def test_a_fork_server_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(_process: object) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(multiprocessing.get_context("forkserver").Process, "start", start)
    with pytest.raises(UserError, match="the server that runs are forked from has died"):
        local._all([None], print, Place(tmp_path), ["cpu"], print)


class Destroyed:
    """What is destroyed while a signal comes."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def deaf(_task: None, _place: Place, connection: Any) -> None:
    """A child that gets SIGTERM where Python drops what the handler raises."""

    def work() -> None:
        sys.unraisablehook = lambda _: None
        Destroyed()
        local._tell(connection, ("error", "went on"))

    local._guarded(work, connection)


def test_a_signal_that_python_drops_ends_a_run_at_its_next_report(tests_in_children: None) -> None:
    (ending,) = local._all([None], deaf, Place(Path()), ["cpu"], lambda event: None)
    assert "its work was done" in ending
