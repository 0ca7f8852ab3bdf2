"""Every method on a GPU that isn't there: tensors without numbers, which know their device and shape.

Run by ``test_gpu_placement.py`` in a process of its own: after such tensors a process may crash later on.

An operator whose tensors lie on two devices is an error here as on a GPU, and so is what a host must wait for: a value,
or a shape that depends on one. Backward passes are left out: the engine asks the driver for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from dfkd_bench import plugins, statistics, teachers
from dfkd_bench.augment import Normalize, random_crop_flip
from dfkd_bench.compute import Compute
from dfkd_bench.evaluate import evaluate
from dfkd_bench.frozen_norm import lighten
from dfkd_bench.job import Recipe
from dfkd_bench.method import LabelledImages, Method, Progress, Task
from dfkd_bench.models import build_model
from dfkd_bench.pool import Pool

pytestmark = [
    pytest.mark.skipif(
        not torch.backends.cuda.is_built() or torch.cuda.is_available(),
        reason="for a PyTorch with CUDA and without a GPU",
    ),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # copy.deepcopy does
]

GPU = torch.device("cuda", 0)
FOUND = plugins.discover(())
SHAPE, CLASSES, POOL = (1, 8, 8), 5, 64
SMALL = {"synthesis_batch_size": 8, "loops": 1, "warmup_loops": 1}
AT = Progress(epoch=5, round=0, epochs=1000, warmup_epochs=0)

WAITING = {"ta_dfkd": DynamicOutputShapeException}
"""Methods whose algorithm has the host wait in synthesis: the student sees those images alone that are good enough."""


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """``Module._apply`` by new parameters: swapping those of this kind in place is refused."""
    for child in module.children():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _backward(loss: Tensor, inputs: Any = None) -> None:
    """Zeros for ``inputs``, else for each leaf of the graph."""
    for leaf in inputs or ():
        leaf.grad = torch.zeros_like(leaf)
    seen, waiting = set[Any](), [] if inputs else [loss.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        waiting += [behind for behind, _ in node.next_functions]


def _grad(_outputs: Tensor, inputs: Any, **_options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs))


def _moments(_context: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes and types of ``_CudaMoments``, whose kernel has no form without numbers."""
    return x.new_zeros(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)


def _line(x: Tensor, *facts: Any) -> Tensor:
    """The same of ``batch_norm_elemt``: facts of each channel, on the device of ``x``."""
    *of_channels, _eps = facts
    assert {each.device for each in of_channels} == {x.device}
    return torch.empty_like(x)


@contextmanager
def _autocast() -> Iterator[None]:
    """``torch.autocast`` would look for the GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def _on_the_host(look: Callable[[Tensor], Any], answer: Any) -> Callable[[Tensor], Any]:
    """A number that was drawn on the host may be looked at."""
    return lambda tensor: answer if tensor.device.type == "cpu" else look(tensor)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    exponential = Tensor.exponential_
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    monkeypatch.setattr(Tensor, "backward", _backward)
    monkeypatch.setattr(torch.autograd, "grad", _grad)
    monkeypatch.setattr(statistics._CudaMoments, "forward", staticmethod(_moments))
    monkeypatch.setattr(torch, "batch_norm_elemt", _line)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
    monkeypatch.setattr(Tensor, "__bool__", _on_the_host(Tensor.__bool__, True))
    monkeypatch.setattr(Tensor, "__int__", _on_the_host(Tensor.__int__, 0))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator=None: exponential(self))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def classifier() -> nn.Module:
    return lighten(build_model("convnet8", CLASSES, SHAPE[0]).to(GPU).eval().requires_grad_(False))


def normalize() -> Normalize:
    return Normalize([0.5], [0.25], GPU)


def labelled() -> LabelledImages:
    images = torch.zeros(POOL, *SHAPE, dtype=torch.uint8, device=GPU)
    return LabelledImages(images, torch.zeros(POOL, dtype=torch.long, device=GPU))


def task() -> Task:
    rng = torch.Generator()  # one of the GPU would need its driver
    teacher = classifier()
    embeddings = torch.randn(CLASSES, 16).to(GPU)
    return Task(
        teacher=teacher,
        teach=torch.no_grad()(teacher),
        num_classes=CLASSES,
        class_names=tuple(f"class {index}" for index in range(CLASSES)),
        image_shape=SHAPE,
        device=GPU,
        normalize=normalize(),
        augment=lambda batch: random_crop_flip(batch, 1, True, rng),
        flip_keeps_class=True,
        crop_padding=1,
        rng=rng,
        label_embeddings=lambda encoder, prompt: embeddings.clone(),
        unlabelled=labelled().images,
    )


def built(name: str) -> Method:
    method = FOUND.method(name)
    wanted: dict[str, Any] = SMALL | ({method.absorbs: 2} if method.absorbs else {})
    fields = method.Config.model_fields
    return method(method.Config(**{key: value for key, value in wanted.items() if key in fields}), task())


METHODS = sorted(name for name in FOUND.methods if "training_data" not in FOUND.method(name).needs)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_stays_on_the_gpu_and_the_host_waits_for_nothing(name: str, gpu: None) -> None:
    """Synthesis, then a student step."""
    method, student = built(name), classifier()
    pool = Pool(SHAPE, GPU, torch.Generator(), spare=lambda _device: None)
    with _autocast():
        with pytest.raises(WAITING[name]) if name in WAITING else nullcontext():
            made = method.synthesize(student, AT)
            assert {value.device for value in (*made.scalars.values(), *made.extras.values())} <= {GPU}
            if made.images is not None:
                pool.add(made.images, made.extras)
        student.train().requires_grad_(True)
        batch = method.student_batch(pool, 8, AT)
        loss = method.student_loss(student, batch, AT)
        loss.backward()
        method.after_student_step(student, batch, AT)
    assert (loss.device, batch.images.device) == (GPU, GPU)


def test_a_teachers_epoch_stays_on_the_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "item", lambda self: 0.0)  # its loss, once an epoch
    teacher = classifier().requires_grad_(True)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    recipe = Recipe(epochs=1, batch_size=16, lr=0.1, augment=True)
    teachers._train_epoch(teacher, optimizer, labelled(), normalize(), recipe, 1, True, Compute(GPU, "fp32"))


def test_an_evaluation_stays_on_the_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "item", lambda self: 0.0)  # accuracy, agreement and calibration
    data = labelled()
    evaluate(classifier(), data.images, data.labels, normalize(), data.labels)
