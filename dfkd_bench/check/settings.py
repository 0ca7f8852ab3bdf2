"""Checks of a method's settings: ``Config``, ``tiny``, ``published``, ``smoke``."""

from __future__ import annotations

import json
import re

from pydantic import ValidationError

from dfkd_bench.check.bench import Subject
from dfkd_bench.check.broken import Broken, named
from dfkd_bench.method import MethodConfig, Published, Schedule


def config_default_constructible(subject: Subject) -> None:
    """`Config` is a MethodConfig and every setting has a default."""
    if not issubclass(subject.method_class.Config, MethodConfig):
        raise Broken("`Config` is no subclass of dfkd_bench.method.MethodConfig")
    required = [name for name, setting in subject.method_class.Config.model_fields.items() if setting.is_required()]
    if required:
        raise Broken(f"no default: {', '.join(required)}")
    subject.method_class.Config()


def config_frozen(subject: Subject) -> None:
    """A setting can't be changed once the configuration is built."""
    config = subject.tiny()
    for name in type(config).model_fields:
        try:
            setattr(config, name, getattr(config, name))
        except ValidationError:
            continue
        raise Broken(f"`{name}` can be assigned to: build `Config` on MethodConfig and leave its `frozen` alone")


def config_json_round_trip(subject: Subject) -> None:
    """Default and tiny settings come back equal from JSON, and are within their own bounds."""
    for config in (subject.method_class.Config(), subject.tiny()):
        back = type(config)(**json.loads(config.model_dump_json()))
        for name in type(config).model_fields:
            if getattr(back, name) != getattr(config, name):
                raise Broken(f"`{name}` is {getattr(config, name)!r} before and {getattr(back, name)!r} after JSON")


def unknown_setting_refused(subject: Subject) -> None:
    """A misspelt setting is an error."""
    try:
        subject.method_class.Config.model_validate({"no_such_setting": 1})
    except ValidationError:
        return
    raise Broken("`Config(no_such_setting=1)` is accepted: build `Config` on MethodConfig and leave its `extra` alone")


def settings_described(subject: Subject) -> None:
    """Every setting has a description."""
    fields = subject.method_class.Config.model_fields
    bare = [name for name, setting in fields.items() if not (setting.description or "").strip()]
    if bare:
        raise Broken(f"no description: {', '.join(bare)}")


def settings_are_not_the_schedules(subject: Subject) -> None:
    """No setting has the name of one of the schedule's, which `-s` would then not reach."""
    both = [name for name in subject.method_class.Config.model_fields if name in Schedule.model_fields]
    if both:
        raise Broken(f"the schedule has these, too: {', '.join(both)}")


def own_settings_parse(subject: Subject) -> None:
    """`published` and `smoke` settings are valid, their keys DATASET or DATASET/TEACHER:STUDENT."""
    cls = subject.method_class
    try:
        cls.Config(**cls.described)
    except ValidationError as error:
        raise Broken(f"described: {named(error)}") from None
    for table, entries in (("published", cls.published), ("smoke", cls.smoke)):
        for key, entry in entries.items():
            if not re.fullmatch(r"[^/:]+(/[^/:]+:[^/:]+)?", key):
                raise Broken(f"{table}['{key}']: expected a data set or DATASET/TEACHER:STUDENT")
            if not isinstance(entry, Published):
                raise Broken(f"{table}['{key}'] is a {type(entry).__name__}, no dfkd_bench.method.Published")
            try:
                cls.Config(**entry.config)
            except ValidationError as error:
                raise Broken(f"{table}['{key}']: {named(error)}") from None


CHECKS = (
    config_default_constructible,
    config_frozen,
    config_json_round_trip,
    unknown_setting_refused,
    settings_described,
    settings_are_not_the_schedules,
    own_settings_parse,
)
