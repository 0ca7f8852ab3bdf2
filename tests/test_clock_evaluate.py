from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import clock as clock_module
from dfkd_bench.ahead import HostImages
from dfkd_bench.augment import Normalize
from dfkd_bench.clock import PHASES, Clock, peak_memory, total
from dfkd_bench.evaluate import evaluate, expected_calibration_error, logits_of

CPU = torch.device("cpu")


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``tick(seconds)`` moves the time, which stands still otherwise."""
    now = 100.0

    def move(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now))
    return move


# -- Clock ----------------------------------------------------------------------------------------------------------


def test_seconds_add_up_by_phase(tick: Callable[[float], None]) -> None:
    clock = Clock(CPU)
    for name, seconds in (("synthesis", 1.5), ("distillation", 2.0), ("synthesis", 0.25)):
        with clock.phase(name):
            tick(seconds)
        tick(10)  # between the phases nothing is counted
    assert clock.settle() == {**dict.fromkeys(PHASES, 0.0), "synthesis": 1.75, "distillation": 2.0}


def test_a_phase_that_fails_is_counted(tick: Callable[[float], None]) -> None:
    clock = Clock(CPU)

    def fail() -> None:
        with clock.phase("setup"):
            tick(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clock.settle()["setup"] == 3


def test_settling_twice_counts_once(tick: Callable[[float], None]) -> None:
    clock = Clock(CPU)
    with clock.phase("sampling"):
        tick(2)
    clock.settle()["sampling"] = 99  # a copy
    assert clock.settle()["sampling"] == 2


def test_time_from_before_an_interruption_is_kept(tick: Callable[[float], None]) -> None:
    before, after = Clock(CPU), Clock(CPU)
    with before.phase("synthesis"):
        tick(4)
    after.resume(before.settle())
    with after.phase("synthesis"):
        tick(1)
    assert after.settle()["synthesis"] == 5


def test_processor_time_is_that_of_the_phases_that_count(
    tick: Callable[[float], None],
) -> None:
    before, after = Clock(CPU), Clock(CPU)
    for name, seconds in (("synthesis", 3.0), ("evaluation", 5.0)):
        with before.phase(name):
            tick(seconds)
    after.resume(before.settle(), before.processor)
    with after.phase("distillation"):
        tick(4)
    assert (before.processor, after.processor) == (3, 7)


def test_set_up_of_a_resumed_run_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too, where the new process's set-up is not settled yet when the old one's time comes back."""
    event = types.SimpleNamespace(record=lambda stream=None: None, elapsed_time=lambda other: 3000.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = Clock(torch.device("cuda"))
    with clock.phase("setup"):
        pass
    clock.resume({"setup": 2.0, "synthesis": 4.0})
    with clock.phase("synthesis"):
        pass
    found = clock.settle()
    assert (found["setup"], found["synthesis"]) == (2.0, 7.0)


def test_processor_time_that_nobody_knows_stays_unknown() -> None:
    clock = Clock(CPU)
    clock.resume({"synthesis": 4.0})
    with clock.phase("synthesis"):
        pass
    assert clock.processor is None


def test_the_headline_leaves_out_evaluation() -> None:
    assert total({"setup": 1, "synthesis": 2, "sampling": 4, "distillation": 8, "evaluation": 16}) == 15


def test_peak_memory_of_the_cpu_is_in_bytes() -> None:
    assert 50e6 < peak_memory(CPU) < 1e12  # torch alone takes more than 50 MB


def test_events_are_recorded_where_the_clocks_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device, whose stream may have nothing to do."""
    recorded: list[object] = []
    event = types.SimpleNamespace(record=lambda stream=None: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with Clock(torch.device("cuda", 1)).phase("synthesis"):
        pass
    assert recorded == ["stream of cuda:1"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seconds_on_a_gpu_are_those_of_the_work() -> None:
    device = torch.device("cuda", 0)
    clock, x = Clock(device), torch.randn(4096, 4096, device=device)
    x @ x  # the library of matrix products starts
    torch.cuda.synchronize(device)
    for name, products in (("synthesis", 20), ("distillation", 200)):
        with clock.phase(name):
            for _ in range(products):
                x @ x
    seconds = clock.settle()
    assert 3 < seconds["distillation"] / seconds["synthesis"] < 30


# -- Evaluation -----------------------------------------------------------------------------------------------------


class FirstPixels(nn.Module):
    """Its logits are the first pixels of the image, one a class."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.batches: list[int] = []
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        self.modes.append(self.training)
        return images.flatten(1)[:, : self.classes]


PLAIN = Normalize([0.0], [1.0])


def images_for(classes: list[int]) -> Tensor:
    """uint8 images whose pixel number c is the brightest one."""
    images = torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8)
    images.view(len(classes), -1)[torch.arange(len(classes)), torch.tensor(classes)] = 255
    return images


def test_accuracy_and_agreement_are_in_percent() -> None:
    answers, labels, teacher = [0, 1, 2, 0, 1], [0, 1, 1, 1, 0], [0, 1, 2, 0, 0]
    found = evaluate(FirstPixels(), images_for(answers), torch.tensor(labels), PLAIN, torch.tensor(teacher))
    assert [found.accuracy, found.agreement] == pytest.approx([40.0, 80.0])


def test_without_a_teacher_there_is_no_agreement() -> None:
    assert evaluate(FirstPixels(), images_for([0]), torch.tensor([0]), PLAIN).agreement is None


def test_calibration_is_the_gap_of_confidence_and_accuracy() -> None:
    confidence = torch.tensor([1.0, 0, 0]).softmax(0).max().item()  # of every image
    found = evaluate(FirstPixels(), images_for([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]), PLAIN)
    assert found.calibration == pytest.approx(100 * (0.75 - confidence), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_student_is_evaluated_in_eval_mode_and_put_back(training: bool) -> None:
    student = FirstPixels().train(training)
    evaluate(student, images_for([0]), torch.tensor([0]), PLAIN)
    assert student.modes == [False]
    assert student.training is training


def test_all_images_are_evaluated_in_batches() -> None:
    model, images = FirstPixels(), torch.randint(256, (11, 1, 2, 2), dtype=torch.uint8)
    logits = logits_of(model, images, PLAIN, batch_size=4)
    assert model.batches == [4, 4, 3]
    torch.testing.assert_close(logits, images.flatten(1)[:, :3] / 255)


def test_images_that_the_device_has_no_room_for_are_evaluated_alike() -> None:
    images, labels = torch.randint(256, (11, 1, 2, 2), dtype=torch.uint8), torch.randint(3, (11,))
    held, teacher = HostImages([images], torch.device("cpu")), torch.randint(3, (11,))
    assert torch.equal(
        logits_of(FirstPixels(), held, PLAIN, batch_size=4), logits_of(FirstPixels(), images, PLAIN, batch_size=4)
    )
    assert evaluate(FirstPixels(), held, labels, PLAIN, teacher) == evaluate(
        FirstPixels(), images, labels, PLAIN, teacher
    )


def test_images_are_normalised() -> None:
    logits = logits_of(FirstPixels(), images_for([1]), Normalize([0.5], [0.25]))
    assert logits.tolist() == [[-2, 2, -2]]


def test_logits_are_fp32_without_a_graph() -> None:
    layer = nn.Linear(4, 3).bfloat16()
    logits = logits_of(lambda x: layer(x.flatten(1).bfloat16()), images_for([0, 1]), PLAIN)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.99, 0.97, 0.41, 0.45])
    correct = torch.tensor([True, True, False, False, True])
    # Bins of width 1/15: {0.95, 0.99, 0.97} and {0.41, 0.45}.
    upper, lower = abs(2 / 3 - 0.97), abs(1 / 2 - 0.43)
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.6 * upper + 0.4 * lower, rel=1e-5)


def test_certain_and_right_is_calibrated() -> None:
    assert expected_calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
