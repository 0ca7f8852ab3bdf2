"""What is asked of a plugin's model before anything runs: each way to miss it is one line that says what is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dfkd_bench.errors import UserError

Builder = Callable[[int, int], nn.Module]

_BATCH = 2  # a single image has no statistics for a BatchNorm in training mode
_TOLERANCE = 1e-3  # of logits that two ways give; layers may round differently


def built(name: str, builder: Builder, classes: int, channels: int) -> nn.Module:
    """What ``builder(classes, channels)`` gives, if it has the parts of a model; else a ``UserError``.

    It must be an ``nn.Module`` with a method ``features`` and a linear ``classifier``, whose state dict can be kept.
    """
    try:
        model = builder(classes, channels)
    except UserError:
        raise
    except Exception as error:  # of the user's code, of any kind
        _refuse(name, f"can't be built: builder(classes={classes}, channels={channels}) raises {_line(error)}")
    if not isinstance(model, nn.Module):
        _refuse(name, f"is of type {type(model).__name__} once it is built: expected an nn.Module")
    if "features" in dict(model.named_children()):  # it would stand beside the method, or in its place
        _refuse(name, "has a layer `features`: give the layer another name, since a method of that name is expected")
    if not callable(getattr(model, "features", None)):
        _refuse(name, "has no method features(images): expected (logits, penultimate features, [outputs of stages])")
    last = getattr(model, "classifier", None)
    if not isinstance(last, nn.Linear) or last.out_features != classes:
        _refuse(name, f"has as `classifier` {_short(last)}: expected its last layer, an nn.Linear to {classes} classes")
    _check_state(name, model)
    return model


def check(name: str, builder: Builder, classes: int, image_shape: tuple[int, int, int]) -> None:
    """Pass two images [C, H, W] through a model that is thrown away afterwards; a ``UserError`` says what is wrong.

    The random state of the process stays as it is.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model: Any = built(name, builder, classes, image_shape[0]).to(memory_format=torch.channels_last)
        images = torch.randn(_BATCH, *image_shape).contiguous(memory_format=torch.channels_last)
        logits = _called(name, "forward() in training mode", model.train(), images)
        _check_logits(name, "forward() in training mode", logits, classes)
        seen: list[Tensor] = []
        handle = model.eval().classifier.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
        logits = _called(name, "forward()", model, images)
        handle.remove()
        _check_logits(name, "forward()", logits, classes)
        found = _called(name, "features()", model.features, images)
        _check_features(name, found, logits, seen)


def _check_features(name: str, found: Any, logits: Tensor, seen: list[Tensor]) -> None:
    """``found``: what ``features`` gave; ``seen``: what went into ``classifier`` when ``forward`` gave ``logits``."""
    if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[2], list | tuple):
        _refuse(name, f"returns {_short(found)} of features(): expected (logits, penultimate features, [stages])")
    again, penultimate, stages = found
    _check_logits(name, "features()", again, logits.shape[1])
    if not torch.allclose(again, logits, rtol=_TOLERANCE, atol=_TOLERANCE):
        _refuse(name, "gives other logits in features() than in forward() in evaluation mode: expected the same")
    if not seen:
        _refuse(name, "does not call its `classifier` in forward(): expected it to be the last layer")
    if (
        not isinstance(penultimate, Tensor)
        or penultimate.shape != seen[-1].shape
        or not torch.allclose(penultimate, seen[-1], rtol=_TOLERANCE, atol=_TOLERANCE)
    ):
        _refuse(name, f"has penultimate features {_short(penultimate)}: expected what goes into its `classifier`")
    if not stages or not all(isinstance(stage, Tensor) and stage.ndim == 4 for stage in stages):
        _refuse(name, f"has stages {_short(stages)}: expected at least one tensor [b, channels, H, W]")


def _called(name: str, what: str, entrance: Callable[[Tensor], Any], images: Tensor) -> Any:
    try:
        return entrance(images)
    except Exception as error:
        _refuse(name, f"fails in {what} on channels-last images {list(images.shape)} with {_line(error)}")


def _check_logits(name: str, what: str, logits: Any, classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.shape != (_BATCH, classes):
        _refuse(name, f"returns {_short(logits)} as logits of {what}: expected a tensor [{_BATCH}, {classes}]")


def _check_state(name: str, model: nn.Module) -> None:
    """Weights are kept as safetensors, which know tensors alone, and each of them once."""
    keys: dict[int, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            _refuse(name, f"has {type(value).__name__} '{key}' in its state dict: expected tensors alone")
        if value.numel() and (other := keys.setdefault(value.untyped_storage().data_ptr(), key)) != key:
            _refuse(
                name,
                f"has one tensor twice in its state dict, as '{other}' and '{key}': register a layer once, and make a "
                "second name for it a property",
            )


def _short(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(_short(item) for item in value)})"[:120]
    return "nothing" if value is None else " ".join(repr(value).split())[:120]


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _refuse(name: str, what: str) -> NoReturn:
    raise UserError(f"the plugin's model '{name}' {what} (docs/own_models_and_data.md)")
