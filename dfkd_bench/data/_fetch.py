"""Raw files: found on disk or downloaded, and compared with their published checksums."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError
from dfkd_bench.files import write_bytes
from dfkd_bench.paths import DATA_VARIABLE

if TYPE_CHECKING:
    from dfkd_bench.data._dataset import DataSet

log = logging.getLogger(__name__)


def raw_path(data: DataSet, root: Path, file: str) -> Path:
    """Where a raw file or folder is; ``UserError``: nowhere, with what was looked for."""
    path = data.raw.find(root, file)
    if path is None:
        raise missing(data, root)
    return path


def fetch(data: DataSet, root: Path, file: str) -> tuple[bytes, Path]:
    """The verified content of a raw file and its path: on disk, else downloaded into the data root."""
    damaged = None
    for path in data.raw.candidates(root, file):
        if path.is_file():
            content = path.read_bytes()
            if is_published(data, file, content):
                return content, path
            damaged = damaged or path  # MNIST and Fashion-MNIST have files of the same names: another may be right
    wrong = UserError(
        f"{damaged} is not the published file of '{data.name}' (its md5 checksum is wrong; it may be truncated): "
        "remove it and start again"
    )
    if damaged and not _may_be_anothers(damaged, root):
        raise wrong
    target = data.raw.candidates(root, file)[0]
    try:
        content = _download(data.raw.address + file)
    except (OSError, http.client.HTTPException) as error:
        failed = f"the download of {data.raw.address}{file} failed ({reason(error)})"
        raise (UserError(f"{wrong}; {failed}") if damaged else missing(data, root, failed)) from None
    if not is_published(data, file, content):
        raise missing(data, root, f"what {data.raw.address}{file} delivers has a wrong md5 checksum")
    try:
        write_bytes(target, content)
    except OSError as error:
        raise UserError(f"can't write {target} ({reason(error)}): name another folder by --data-root DIR") from None
    return content, target


def _may_be_anothers(path: Path, root: Path) -> bool:
    """Whether a file that isn't this data set's may well be another's: the data root is for all of them."""
    return path.parent == root


def is_published(data: DataSet, file: str, content: bytes) -> bool:
    """True if the content has one of the published checksums of that raw file."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest() in data.raw.checksums[file]


def missing(data: DataSet, root: Path, why: str = "") -> UserError:
    """The error for raw files that are not there: what was looked for, and what to do."""
    advice = "".join(f"; {text}" for text in (data.raw.advice, why) if text)
    return UserError(
        f"data set '{data.name}' is missing: wanted {data.raw.looked_for(root)}: put it there or name its folder by "
        f"--data-root DIR or ${DATA_VARIABLE}{advice}"
    )


def _download(address: str) -> bytes:
    log.info("downloading %s", address)
    with urllib.request.urlopen(address, timeout=30) as answer:
        return cast(bytes, answer.read())
