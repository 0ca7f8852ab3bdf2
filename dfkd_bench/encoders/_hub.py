"""What the encoders share that may fetch their weights from the model hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

from dfkd_bench.encoders import first_line

PROBE_SECONDS = 5.0  # how long the model hub may take to answer before it counts as out of reach

log = logging.getLogger(__name__)


@contextlib.contextmanager
def short_wait(online: bool) -> Iterator[None]:
    """Where the model hub is out of reach, only its cache is looked at: its client would go on trying (CLIP: 46 s)."""
    from huggingface_hub import constants, get_session

    offline, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    if online and not offline:
        try:
            if get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code >= 500:
                raise ConnectionError("it answers with an error")
        except Exception as error:  # of whichever HTTP library the hub's client uses
            log.info("the model hub can't be reached (%s): only its cache is looked at", first_line(error))
            constants.HF_HUB_OFFLINE = True
    logging.disable(max(disabled, logging.ERROR))  # open_clip logs what it also raises
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(disabled)


def state_sha256(model: Any) -> str:
    """Of all parameters and buffers by name: for weights whose file the library keeps to itself."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()
