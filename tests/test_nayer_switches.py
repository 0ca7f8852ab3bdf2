"""NAYER's ablations: each switch changes what it should and nothing else, and every combination is a sound method."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_bench import check, plugins
from dfkd_bench.checkpoint import load_tree, save_tree
from dfkd_bench.method import Progress, Schedule, Task
from dfkd_bench.methods.nayer import (
    ConcatNoise,
    MixNoise,
    Nayer,
    NayerConfig,
    NoisyLayers,
    PlainLayer,
    SumNoise,
    balanced_labels,
)

K, D, B, OUT, Z = 5, 16, 10, 8, 6  # classes, width of the fixtures' embeddings, images, noisy width, noise width
At = Callable[..., Progress]
Fields = dict[str, Any]

SWITCHES: dict[str, Fields] = {
    "default": {},
    "concat": {"noise": "concat"},
    "sum": {"noise": "sum"},
    "mix": {"noise": "mix"},
    "none": {"noise": "none"},
    "concat_normal": {"noise": "concat_normal"},
    "sum_normal": {"noise": "sum_normal"},
    "none_normal": {"noise": "none_normal"},
    "kept": {"reinitialize": False},
    "one_to_one": {"layers": "one_to_one"},
    "no_batchnorm": {"noisy_batchnorm": False},
    "noise_input": {"input": "noise"},
    "noise_alone": {"input": "noise", "noise": "none"},
    "never_rebuilt": {"generator_life": None},
}
TOGETHER: dict[str, Fields] = {
    "kept_one_to_one_no_batchnorm": {"reinitialize": False, "layers": "one_to_one", "noisy_batchnorm": False},
    "noise_alone_no_batchnorm": {"input": "noise", "noise": "none", "noisy_batchnorm": False},
    "concat_no_batchnorm": {"noise": "concat", "noisy_batchnorm": False, "generator_life": None},
}


def new_method(task: Task, **fields: Any) -> Nayer:
    values = {
        "encoder": "random:16",
        "synthesis_batch_size": B,
        "generator_steps": 3,
        "loops": 2,
        "warmup_loops": 2,
        "noisy_width": OUT,
        "noise_width": Z,
        "generator_width": 4,
    }
    torch.manual_seed(0)
    return Nayer(NayerConfig(**(values | fields)), task)


def labels_of(task: Task) -> Tensor:
    """Two whole blocks 0..K-1."""
    return balanced_labels(B, K, task.rng, task.device)


def images_of(method: Nayer, given: Tensor) -> Tensor:
    with torch.no_grad():
        images: Tensor = method.generator(given)
    return images


# -- The golden values of the released form -------------------------------------------------------------------------


def test_defaults_make_the_images_of_before_the_switches(
    make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At
) -> None:
    """Values of this method as it was before it had switches: same seeds, same images."""
    method, student = new_method(make_task(), synthesis_batch_size=12), make_student()
    made = [method.synthesize(student, at(epoch, warmup=1)).images for epoch in range(3)]
    images = torch.cat([batch for batch in made if batch is not None]).double()
    got = [images.mean().item(), images.std().item(), *images[[0, 30, 71], 0, 3, 4].tolist()]
    golden = [0.5147505408, 0.1513205843, 0.3572982252, 0.8916482329, 0.7200928330]
    assert got == pytest.approx(golden, abs=1e-3)


# -- Noisy layers ---------------------------------------------------------------------------------------------------


def test_one_to_one_is_a_plain_loop_over_rows() -> None:
    layers = NoisyLayers(B, 1, D, OUT).double()
    with torch.no_grad():
        layers.bias.normal_()
    x = torch.randn(B, D, dtype=torch.float64)
    expected = [layers.weight[row] @ x[row] + layers.bias[row] for row in range(B)]
    torch.testing.assert_close(layers(x), torch.stack(expected))


def test_one_to_one_with_equal_layers_in_each_block_is_k_to_1() -> None:
    few, many = NoisyLayers(B // K, K, D, OUT).double(), NoisyLayers(B, 1, D, OUT).double()
    with torch.no_grad():
        many.weight.copy_(few.weight.repeat_interleave(K, dim=0))
    x = torch.randn(B, D, dtype=torch.float64)
    torch.testing.assert_close(few(x), many(x))


@pytest.mark.parametrize(
    ("size", "layers", "number"),
    [(10, "k_to_1", 2), (12, "k_to_1", 3), (3, "k_to_1", 1), (10, "one_to_one", 10), (12, "one_to_one", 12)],
)
def test_the_number_of_noisy_layers_and_their_memory(
    task: Task, student: nn.Module, at: At, size: int, layers: str, number: int
) -> None:
    method = new_method(task, synthesis_batch_size=size, layers=layers)
    assert method.generator.noisy.weight.shape == (number, OUT, D)
    counted = method.synthesize(student, at(1)).scalars["noisy_layer_bytes"]
    assert counted.item() == number * (OUT * D + OUT) * 4


@pytest.mark.parametrize("noise", ["concat", "sum", "mix", "none", "none_normal"])
def test_without_noisy_layers_they_take_no_memory(task: Task, student: nn.Module, at: At, noise: str) -> None:
    made = new_method(task, noise=noise).synthesize(student, at(1))
    assert made.scalars["noisy_layer_bytes"].item() == 0


def test_memory_at_the_published_size() -> None:
    """CIFAR-100's script in the released form: 2,052,000 numbers of four bytes."""
    with torch.device("meta"):
        layers = NoisyLayers(4, 100, 512, 1000)
    assert sum(p.numel() for p in layers.parameters()) == 2_052_000


# -- What stands in their place -------------------------------------------------------------------------------------


def test_concatenated_noise_is_read_behind_the_embedding() -> None:
    layer, x = ConcatNoise(D + Z, OUT, B, Z), torch.randn(B, D)
    embedding, noise = layer.weight[:, :D], layer.weight[:, D:]
    torch.testing.assert_close(layer(x), x @ embedding.T + layer.z @ noise.T + layer.bias)


def test_added_noise_is_scaled() -> None:
    layer, x = SumNoise(D, OUT, B, D, 0.25), torch.randn(B, D)
    torch.manual_seed(3)
    layer.reinitialize()
    torch.manual_seed(3)
    z = torch.randn(B, D)
    torch.testing.assert_close(layer(x), nn.functional.linear(x + 0.25 * z, layer.weight, layer.bias))


def test_no_scale_is_no_noise() -> None:
    layer, x = SumNoise(D, OUT, B, D, 0.0), torch.randn(B, D)
    assert torch.equal(layer(x), PlainLayer.forward(layer, x))


def test_mixed_embeddings_are_those_of_two_rows_and_the_own_prevails() -> None:
    rows = 2000
    layer = MixNoise(rows, rows, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(rows))
        layer.bias.zero_()
        mixed = layer(torch.eye(rows))
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(rows))
    assert (mixed > 0).sum(dim=1).max() == 2
    assert mixed.diagonal().min() >= 0.5
    others = mixed.topk(2, dim=1).values[:, 1]
    assert others.mean().item() == pytest.approx(0.25, abs=0.02)  # uniform from 0 to a half
    assert others.std().item() == pytest.approx(0.5 / 12**0.5, abs=0.01)


@pytest.mark.parametrize("kind", [ConcatNoise, SumNoise])
def test_noise_is_standard_normal(kind: type[ConcatNoise | SumNoise]) -> None:
    layer = kind(500, OUT, 400, 500)
    assert layer.z.mean().item() == pytest.approx(0, abs=0.01)
    assert layer.z.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("noise", "kind"), [("concat_normal", ConcatNoise), ("sum_normal", SumNoise), ("none_normal", PlainLayer)]
)
def test_an_ordinary_layer_may_start_as_noisy_layers_do(task: Task, noise: str, kind: type[PlainLayer]) -> None:
    layer = new_method(task, noise=noise, noisy_width=500, generator_width=4).generator.noisy
    assert type(layer) is kind
    assert layer.weight.std().item() == pytest.approx(1, abs=0.03)
    assert layer.bias.abs().max() == 0


def test_it_is_not_drawn_anew(task: Task, student: nn.Module, at: At) -> None:
    (_, end), (start, _) = watch_batches(new_method(task, noise="none_normal"), student, at)
    assert torch.equal(end["noisy.weight"], start["noisy.weight"])


# -- Where the noise comes from -------------------------------------------------------------------------------------

RANDOM = {name: SWITCHES[name] for name in ("default", "concat", "sum", "mix", "one_to_one")}


@pytest.mark.parametrize("fields", RANDOM.values(), ids=RANDOM)
def test_noise_makes_images_of_one_label_differ_and_is_fixed_within_a_batch(task: Task, fields: Fields) -> None:
    method = new_method(task, **fields)
    given = method._embed(labels_of(task))
    first, again = images_of(method, given), images_of(method, given)
    method.generator.noisy.reinitialize()
    redrawn = images_of(method, given)
    assert torch.equal(first, again)
    assert (first[:K] - first[K:]).abs().mean() > 1e-3
    assert (redrawn - first).abs().mean() > 1e-3


def test_without_noise_equal_labels_make_equal_images(task: Task) -> None:
    method = new_method(task, noise="none")
    given = method._embed(labels_of(task))
    first = images_of(method, given)
    method.generator.noisy.reinitialize()
    torch.testing.assert_close(first[:K], first[K:])
    assert torch.equal(images_of(method, given), first)


def test_images_of_a_block_share_a_layer_but_not_one_to_one(task: Task) -> None:
    given = torch.ones(B, D, dtype=torch.float64)
    few, many = (new_method(task, layers=layers).generator.noisy.double() for layers in ("k_to_1", "one_to_one"))
    assert [len(layers(given).unique(dim=0)) for layers in (few, many)] == [B // K, B]


def test_noise_input_knows_nothing_of_the_labels(make_task: Callable[..., Task]) -> None:
    def given(shift: int) -> Tensor:
        method = new_method(make_task(), input="noise")
        return method._embed((torch.arange(B) + shift) % K)

    assert given(0).shape == (B, Z)
    assert torch.equal(given(0), given(1))


def test_noise_input_is_drawn_anew_for_every_batch(task: Task, student: nn.Module, at: At) -> None:
    method, inputs = new_method(task, input="noise", noise="none"), []
    method.generator.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
    method.synthesize(student, at(1))
    assert [torch.equal(inputs[0], other) for other in inputs] == [True] * 3 + [False] * 3


def test_noise_input_reads_no_embeddings(make_task: Callable[..., Task]) -> None:
    def refuse(encoder: str, prompt: str) -> Tensor:
        raise AssertionError("read")

    assert new_method(make_task(label_embeddings=refuse), input="noise").embeddings is None


# -- Each switch, and nothing else ----------------------------------------------------------------------------------


def watch_batches(method: Nayer, student: nn.Module, at: At) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The generator's parameters at the first and after the last step of every batch of one call."""
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    one_batch, state = (
        method._one_batch,
        lambda: {n: p.detach().clone() for n, p in method.generator.named_parameters()},
    )

    def watched(*arguments: Any, **options: Any) -> Any:
        starts: list[dict[str, Tensor]] = []
        hook = method.generator.register_forward_pre_hook(lambda *_: starts.append(state()))
        made = one_batch(*arguments, **options)
        hook.remove()
        seen.append((starts[0], state()))
        return made

    method._one_batch = watched  # type: ignore[method-assign]
    method.synthesize(student, at(1))
    return seen


@pytest.mark.parametrize("name", [*SWITCHES, *TOGETHER])
def test_what_is_new_in_the_next_batch(task: Task, student: nn.Module, at: At, name: str) -> None:
    """Noisy layers, where they are drawn anew; everything else goes on from where the last batch left it."""
    fields = {**SWITCHES, **TOGETHER}[name]
    (_, end), (start, _) = watch_batches(new_method(task, **fields), student, at)
    redrawn = fields.get("noise", "layer") == "layer" and fields.get("reinitialize", True)
    changed = {parameter for parameter in end if not torch.equal(end[parameter], start[parameter])}
    assert changed == ({"noisy.weight", "noisy.bias"} if redrawn else set())


@pytest.mark.parametrize("name", [*SWITCHES, *TOGETHER])
def test_every_parameter_is_trained(task: Task, student: nn.Module, at: At, name: str) -> None:
    start, end = watch_batches(new_method(task, **{**SWITCHES, **TOGETHER}[name]), student, at)[0]
    assert [parameter for parameter in start if torch.equal(start[parameter], end[parameter])] == []


@pytest.mark.parametrize("name", ["concat", "sum", "mix"])
def test_noise_is_no_parameter_and_has_no_gradient(task: Task, student: nn.Module, at: At, name: str) -> None:
    method = new_method(task, **SWITCHES[name], loops=1)
    noisy, drawn = method.generator.noisy, []
    method.generator.register_forward_hook(lambda *_: drawn.append([b.clone() for b in noisy.buffers()]))
    method.synthesize(student, at(1))
    assert {parameter for parameter, _ in noisy.named_parameters()} == {"weight", "bias"}
    assert all(torch.equal(one, other) for step in drawn for one, other in zip(drawn[0], step, strict=True))
    assert not any(buffer.requires_grad for buffer in noisy.buffers())


@pytest.mark.parametrize(
    ("name", "inputs", "into_layer"),
    [("default", D, D), ("concat", D, D + Z), ("sum", D, D), ("mix", D, D), ("none", D, D), ("noise_alone", Z, Z)],
)
def test_widths(task: Task, name: str, inputs: int, into_layer: int) -> None:
    generator = new_method(task, **SWITCHES[name]).generator
    assert isinstance(generator.norm, nn.BatchNorm1d)
    assert generator.norm.num_features == inputs
    assert generator.noisy.weight.shape[-2:] == (OUT, into_layer)
    assert generator.project.in_features == OUT


@pytest.mark.parametrize("name", ["concat", "sum", "mix", "none"])
def test_the_generator_behind_the_noise_is_the_same(task: Task, name: str) -> None:
    def shapes(fields: Fields) -> dict[str, torch.Size]:
        state = new_method(task, **fields).generator.state_dict()
        return {key: value.shape for key, value in state.items() if not key.startswith("noisy.")}

    assert shapes(SWITCHES[name]) == shapes({})


def test_without_batchnorm_embeddings_enter_as_they_are(task: Task) -> None:
    method, given = new_method(task, noisy_batchnorm=False), []
    method.generator.noisy.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    labels = labels_of(task)
    images_of(method, method._embed(labels))
    assert method.embeddings is not None
    assert torch.equal(given[0], method.embeddings[labels])


def test_without_batchnorm_only_its_parameters_are_missing(task: Task) -> None:
    having, missing = (set(new_method(task, noisy_batchnorm=on).generator.state_dict()) for on in (True, False))
    assert missing < having
    assert {name.split(".")[0] for name in having - missing} == {"norm"}


@pytest.mark.parametrize(("warmup", "life", "built"), [(2, None, 0), (2, 2, 3), (0, 4, 2)])
def test_the_generators_life(task: Task, student: nn.Module, at: At, warmup: int, life: int | None, built: int) -> None:
    method, generators = new_method(task, generator_life=life, generator_steps=1), set()
    first = method.generator
    for epoch in range(6):
        method.synthesize(student, at(epoch, warmup))
        generators.add(method.generator)
    assert len(generators - {first}) == built


# -- Sound methods --------------------------------------------------------------------------------------------------

ALL_FIELDS = {**SWITCHES, **TOGETHER}
BEHAVIOUR = (
    "images_in_range",
    "scalars_are_tensors",
    "teacher_unchanged",
    "student_unchanged_by_synthesis",
    "no_gradients_left_on_student",
    "generation_cost_is_counted",
    "state_can_be_saved",
    "works_with_many_classes",
)


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_conformance(name: str) -> None:
    """The checks of behaviour with the switch on; the others read the file."""
    switched = type("Switched", (Nayer,), {"tiny": {**Nayer.tiny, "student_eval": True, **ALL_FIELDS[name]}})
    subject = check.Subject(plugins.discover().source("nayer"), switched)
    for function in check.CHECKS:
        if function.__name__ in BEHAVIOUR:
            function(subject)


def test_the_named_checks_exist() -> None:
    assert set(BEHAVIOUR) <= set(check.check_names())


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_resumed_in_a_generators_life_it_makes_the_same_images(
    make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At, tmp_path: Path, name: str
) -> None:
    task, student = make_task(), make_student()
    method = new_method(task, loops=1, **ALL_FIELDS[name])
    method.synthesize(student, at(0))
    tree = {"method": method.state_dict(), "student": student.state_dict(), "rng": task.rng.get_state()}
    save_tree(tmp_path / "state", {**tree, "torch": torch.get_rng_state()})
    expected = method.synthesize(student, at(1)).images

    saved, task, student = load_tree(tmp_path / "state"), make_task(), make_student()
    other = new_method(task, loops=1, **ALL_FIELDS[name])
    other.load_state_dict(saved["method"])
    student.load_state_dict(saved["student"])
    task.rng.set_state(saved["rng"])
    torch.set_rng_state(saved["torch"])
    got = other.synthesize(student, at(1)).images
    assert got is not None
    assert expected is not None
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("noise", "fields"),
    [
        *itertools.product(["concat", "sum", "mix", "none_normal"], [{"input": "noise"}]),
        *itertools.product(
            ["concat", "sum", "mix", "none", "none_normal"], [{"reinitialize": False}, {"layers": "one_to_one"}]
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(noise: str, fields: Fields) -> None:
    with pytest.raises(ValidationError) as caught:
        NayerConfig(noise=noise, **fields)  # type: ignore[arg-type]
    (problem,) = caught.value.errors()
    assert f"noise={noise}" in problem["msg"]
    assert "\n" not in problem["msg"]


@pytest.mark.parametrize("encoder", ["clip", "sbert", "onehot", "random:8"])
@pytest.mark.parametrize("prompt", ["a image of {name}", "class {index}", "P1", "P3"])
def test_noise_input_needs_no_outside_knowledge(encoder: str, prompt: str) -> None:
    for noise in ("layer", "none"):
        config = NayerConfig(input="noise", noise=noise, encoder=encoder, prompt=prompt)
        assert Nayer.outside_knowledge(config) == "none"


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("P1", None),  # what the card says: class names and a text encoder
        ("P2", None),
        ("nayer", None),
        ("a {name} of {index}", None),
        ("P3", "a text encoder (index prompt)"),
        ("class {index}", "a text encoder (index prompt)"),
    ],
)
@pytest.mark.parametrize("noise", ["layer", "concat", "sum", "mix", "none"])
def test_outside_knowledge_depends_on_encoder_and_prompt_not_on_the_noise(
    noise: str, prompt: str, known: str | None
) -> None:
    config = NayerConfig(noise=noise, encoder="sbert", prompt=prompt)  # type: ignore[arg-type]
    assert Nayer.outside_knowledge(config) == known
    assert Nayer.outside_knowledge(config.model_copy(update={"encoder": "onehot"})) == "none"


@pytest.mark.parametrize("dataset", sorted(Nayer.published))
def test_switches_do_not_change_what_a_run_costs(dataset: str) -> None:
    published = Nayer.published[dataset]
    config = NayerConfig(**published.config)
    expected = 160_000 * config.generator_steps
    for fields in ALL_FIELDS.values():
        switched = NayerConfig(**{**published.config, **fields})
        assert Nayer.generation_cost(switched, published.schedule, 10) == expected


def test_cost_counts_the_rounds_of_an_epoch() -> None:
    config = NayerConfig(synthesis_batch_size=10, generator_steps=3, loops=2, warmup_loops=5)
    schedule = Schedule(epochs=7, warmup_epochs=1, rounds_per_epoch=2, student_steps=1, batch_size=2, lr=0.1)
    assert Nayer.generation_cost(config, schedule, 10) == 2 * (5 + 6 * 2) * 3 * 10
