"""What a suite still needs, and doing it: data, embeddings, teachers, runs, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dfkd_bench import data, lend, needs, record, teachers, text
from dfkd_bench.engines import local
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job, Precision, TeacherSpec
from dfkd_bench.models import check_model
from dfkd_bench.plugins import Plugins
from dfkd_bench.record import Record
from dfkd_bench.run import Place
from dfkd_bench.runfolder import RunFolder
from dfkd_bench.suite import Suite, expand
from dfkd_bench.workload import longest_first

JobState = Literal["new", "interrupted", "running", "done", "failed", "stale"]
"""``interrupted``: goes on from its checkpoint. ``stale``: done, but the method's source has changed since. A run that
failed with other code than today's is ``new``: there is no result to lose, and the change may well mend it."""


@dataclass(frozen=True)
class Planned:
    """A job and where it stands; ``record`` if there is one."""

    job: Job
    state: JobState
    record: Record | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs of a suite with their states, and the teachers that are trained first if nothing is done again."""

    suite: Suite
    planned: tuple[Planned, ...]
    missing_teachers: tuple[TeacherSpec, ...]

    def to_run(self, rerun: Sequence[str] = ()) -> list[Job]:
        """Jobs that are not done; with ``rerun`` also those that failed or are stale."""
        wanted = {"new", "interrupted", "running", *rerun}
        return [planned.job for planned in self.planned if planned.state in wanted]

    def records(self) -> list[Record]:
        """The records at hand."""
        return [planned.record for planned in self.planned if planned.record is not None]

    def behind_names(self, output: Path) -> str:
        """What its files in ``output`` have behind their names: the precision, where as many records of the same jobs
        in the other one are there, or more; else "".

        So the table that was there first is not overwritten, and whoever adds to its records on a machine of another
        kind (``--precision bf16``) goes on with its plain name.
        """
        jobs = [planned.job for planned in self.planned]
        others = [
            job.model_copy(update={"precision": other})
            for job in jobs
            for other in get_args(Precision)
            if other != job.precision
        ]
        count = sum(record.record_path(output, job).is_file() for job in others)
        return f"-{jobs[0].precision}" if count > 0 and count >= len(self.records()) else ""


def make_plan(
    suite: Suite,
    found: Plugins,
    output: Path,
    data_root: Path | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Plan:
    """Look at what is there; nothing is started."""
    dataset = data.dataset(suite.dataset, data_root, found.datasets)
    jobs = expand(suite, found, dataset, device, precision)
    known = _known((job.method for job in jobs), found)
    planned = tuple(_where_it_stands(job, output, *known[job.method]) for job in jobs)
    left = Plan(suite, planned, ()).to_run()
    for name in sorted({name for job in left for name in (job.teacher.model, job.student)}):
        check_model(name, dataset.num_classes, dataset.image_shape, found.models)
    return Plan(suite, planned, _missing_teachers(left, dataset, output))


def _missing_teachers(jobs: Sequence[Job], dataset: data.DataSet, output: Path) -> tuple[TeacherSpec, ...]:
    return tuple(spec for spec in _teachers_of(jobs) if not teachers.is_at_hand(dataset, spec, output))


def _teachers_of(jobs: Sequence[Job]) -> list[TeacherSpec]:
    return list({job.teacher.model_dump_json(): job.teacher for job in jobs}.values())


def _one_teacher(jobs: Sequence[Job], kept: Sequence[Planned], dataset: data.DataSet, output: Path) -> None:
    """Refuse, before the runs and not in the table after them, what can't stand beside the records that stay."""
    for spec in _teachers_of(jobs):
        place = teachers.find(dataset, spec, output)
        now = teachers.read_card(place)
        facts = [item.record.teacher for item in kept if item.record and item.job.teacher == spec]
        others = [fact.sha256[:12] for fact in facts if fact is not None and fact.sha256 != now.sha256]
        if others:
            raise UserError(
                f"{len(others)} of this table's records in {output} were made with another {spec.model} (sha256 "
                f"{others[0]}) than the one at hand ({now.sha256[:12]}), and no table mixes them: put theirs in "
                f"{teachers.folder(dataset, spec, output)}, give another --output, or delete these records"
            )


def _where_it_stands(job: Job, output: Path, today: str, same_results: frozenset[str]) -> Planned:
    """A record of earlier code with the same results counts as one of today's, here and in tables."""
    path = record.record_path(output, job)
    if path.is_file():
        found = record.read(path)
        if found.status == "failed":
            state: JobState = "failed" if found.is_of_today(same_results) else "new"
            return Planned(job, state, _cited_as(job, found))
        if not found.is_fresh(same_results):
            return Planned(job, "stale", _cited_as(job, found))
        return Planned(job, "done", _as_of_today(job, found, today, same_results))
    folder = RunFolder(job)
    if folder.is_running:
        return Planned(job, "running")
    return Planned(job, "interrupted" if folder.has_checkpoint else "new")


def made_by_other_code(records: Iterable[Record], found: Plugins) -> frozenset[str]:
    """Job ids of those of ``records`` that are stale: they are shown, and no command makes them anew unasked."""
    ended = [item for item in records if item.status != "failed"]
    known = _known((item.job.method for item in ended), found)
    return frozenset(item.job_id for item in ended if not item.is_fresh(known[item.job.method][1]))


def _as_of_today(job: Job, found: Record, today: str, same_results: frozenset[str]) -> Record:
    """The record, of today's code if that has the same results, and of today's citation of its settings."""
    cited = _cited_as(job, found)
    if found.method.source_sha256 not in same_results:
        return cited
    return cited.model_copy(update={"method": found.method.model_copy(update={"source_sha256": today})})


def _cited_as(job: Job, found: Record) -> Record:
    """The record with origin and source of ``job``, which has its id: two jobs of one id differ in these alone."""
    cited = found.job.model_copy(update={"origin": job.origin, "source": job.source})
    return found.model_copy(update={"job": cited})


def _known(names: Iterable[str], found: Plugins) -> dict[str, tuple[str, frozenset[str]]]:
    """Of each method today's source, and all with the same results."""
    known = {}
    for name in set(names):
        source = found.source(name)
        today = source.source_sha256()  # not twice: it parses the file
        known[name] = (today, source.earlier_sources() | {today})
    return known


@dataclass(frozen=True)
class Step:
    """Reported while a plan is carried out. ``index`` counts within the stage, ``share`` is its part of the work."""

    stage: Literal["data", "embeddings", "teachers", "runs"]
    label: str
    index: int
    count: int
    share: float = 0.0
    event: local.Event | None = None


def carry_out(
    plan: Plan,
    found: Plugins,
    place: Place,
    devices: Sequence[str],
    rerun: Sequence[str] = (),
    report: Callable[[Step], None] = lambda step: None,
) -> list[Record]:
    """Do what is left; returns all records of the plan, old and new. Jobs that run elsewhere have none yet."""
    jobs = plan.to_run(rerun)
    if jobs:
        local.output_is_writable(place.output)
        dataset = data.dataset(plan.suite.dataset, place.data_root, found.datasets)
        missing = _missing_teachers(jobs, dataset, place.output)
        _needs_are_met(jobs, found, dataset, place.data_root, report)
        _prepare_splits(jobs, missing, found, dataset, place.data_root, report)
        tasks = [local.TeacherTask(dataset.name, spec, jobs[0].precision) for spec in missing]
        names, equal = [f"teacher {task.spec.model}" for task in tasks], [1 / len(tasks) for _ in tasks]
        local.train_teachers(tasks, place, devices, _listener("teachers", names, equal, report))
        _one_teacher(jobs, [item for item in plan.planned if item.state not in {"new", *rerun}], dataset, place.output)
        for spec in _teachers_of(jobs):
            teachers.keep_beside(dataset, spec, place.output)
        for item in plan.planned:  # a record that is made anew must not be taken for the old one if the run dies
            path = record.record_path(place.output, item.job)
            if (
                item.state in {"new", *rerun}
                and path.is_file()
                and _cited_as(item.job, record.read(path)) == item.record
            ):
                path.unlink(missing_ok=True)  # else another made it; a task that was asked the same may be quicker
        jobs, shares = longest_first(jobs, found, dataset.num_classes)
        labels = [f"{job.method} seed {job.seed}" for job in jobs]
        # What was to be done again has no record now: one that is there, failed or not, another task has made since.
        place = replace(place, keep_failed=True)
        local.run_jobs(jobs, place, devices, _listener("runs", labels, shares, report))
    known = _known((item.job.method for item in plan.planned), found)
    paths = {item.job.id: (record.record_path(place.output, item.job), item.job) for item in plan.planned}
    return [_as_of_today(job, record.read(path), *known[job.method]) for path, job in paths.values() if path.is_file()]


def get_ready(
    plan: Plan, found: Plugins, data_root: Path | None = None, report: Callable[[Step], None] = lambda step: None
) -> list[data.Split]:
    """Data, pools and label-text embeddings: all that may want a network. Returns the splits prepared.

    Of all runs, done or not: another machine may see other ones. Data come first, so that they are there even if a text
    encoder can't be had.
    """
    dataset = data.dataset(plan.suite.dataset, data_root, found.datasets)
    jobs = [item.job for item in plan.planned]
    splits = _prepare_splits(jobs, plan.missing_teachers, found, dataset, data_root, report)
    _needs_are_met(jobs, found, dataset, data_root, report)
    return splits


def _prepare_splits(
    jobs: Sequence[Job],
    missing: Sequence[TeacherSpec],
    found: Plugins,
    dataset: data.DataSet,
    root: Path | None,
    report: Callable[[Step], None],
) -> list[data.Split]:
    report(Step("data", dataset.name, 0, 1))
    splits = _splits(jobs, missing, found)
    for split in splits:
        dataset.split(split, root)
    return splits


def _splits(jobs: Sequence[Job], missing: Sequence[TeacherSpec], found: Plugins) -> list[data.Split]:
    """What the jobs and the training of ``missing`` teachers will open, and no more: whoever compresses an imported
    teacher may lack its training data, or not want 1.3 million images prepared."""
    wanted: set[data.Split] = {job.evaluate_on for job in jobs}
    if any(spec.recipe is not None for spec in missing):  # it is measured on both other splits
        wanted.update(data.SPLITS)
    for job in jobs:
        if "training_data" in found.method(job.method).needs:
            wanted.update(teachers.control_splits(job.teacher, job.evaluate_on))
    return [split for split in data.SPLITS if split in wanted]


def _needs_are_met(
    jobs: Sequence[Job],
    found: Plugins,
    dataset: data.DataSet,
    root: Path | None,
    report: Callable[[Step], None],
) -> None:
    """What methods need beside the teacher is looked at before anything is trained. Label-text embeddings are made
    here, so that no text encoder is ever imported in a run."""
    # Folders of images are decoded here, so that the runs only map what was decoded.
    for job in {(job.method, *map(str, job.config.items())): job for job in jobs}.values():
        method = found.method(job.method)
        if "unlabelled" in method.needs:
            try:
                pool = lend.known_pool(job.config["pool"], dataset, root, found.datasets)
                if isinstance(pool, Path):
                    lend.folder_images(pool, dataset.image_shape, resize=True)
                else:
                    pool.split("train", root)
            except UserError as error:
                raise UserError(f"{job.method}: {error}") from None
        folder = job.config.get("initial_images") if "initial_images" in method.needs else None
        if folder is not None:
            try:
                lend.initial_images(folder, dataset, root, found.datasets)
            except UserError as error:
                raise UserError(f"{job.method}: {error}") from None
    wanted = needs.label_texts(jobs, found)
    for index, one in enumerate(wanted):
        report(Step("embeddings", one.encoder, index, len(wanted)))
        try:
            text.ensure(dataset.name, dataset.class_names, one.encoder, one.prompt, found.encoders)
        except UserError as error:
            raise UserError(f"{one.method}: {error}") from None


def _listener(
    stage: Literal["teachers", "runs"], labels: Sequence[str], shares: Sequence[float], report: Callable[[Step], None]
) -> local.Listener:
    return lambda event: report(Step(stage, labels[event.task], event.task, len(labels), shares[event.task], event))
