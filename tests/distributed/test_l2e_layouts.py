"""The whole method through DeepSpeed, in every layout, against a plain float64 run.

The reference is transformers' GPT-NeoX in float64 with the method written out around it; it uses
no class of the project. Plain SGD, so that parameters show their gradients.

pytest runs every layout, ZeRO stages, micro-batches and activation checkpointing taking turns;
`python -m tests.distributed.test_l2e_layouts` runs all 162 combinations (20 minutes); with the name
of another of the FORMS behind it those of that one, with numbers behind the name those of so many
processes.
"""

import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.processes import run_on_processes
from tests.l2e.reference import Reference
from tests.tiny_models import gpt_neox

SHAPE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
INHIBITED, SEQUENCES, LENGTH, STEPS = (1, 2), 16, 16, 10
L2E = {"weight": 0.3, "late_start_step": 3, "forget_step": 5, "layers": list(INHIBITED)}
RATE = 0.5
WHOLE, STAGES = 1, 2
KERNELS = ("auto", "plain")  # which on a CPU go different ways
TURNS = list(itertools.product((1, 2, 4), (False, True)))  # micro-batches, checkpointing
OUTPUT = {"embed_out.weight": "lm_head.weight"}  # what transformers calls it today


def configuration(tensor, pipeline, zero, micro_batch, checkpointing, dtype="fp32", **l2e):
    return {
        "model": {**SHAPE, "max_position_embeddings": LENGTH},
        "l2e": L2E | l2e,
        "data": {"sequence_length": LENGTH},
        "optimizer": {
            "type": "sgd",
            "learning_rate": RATE,
            "weight_decay": 0.0,
            "gradient_clipping": 0.0,
        },
        "parallel": {
            "tensor": tensor,
            "pipeline": pipeline,
            "activation_checkpointing": checkpointing,
        },
        "train": {"global_batch_size": SEQUENCES, "micro_batch_size": micro_batch, "dtype": dtype},
        "deepspeed": {"zero_optimization": {"stage": zero}},
    }


def whole_matrix(processes):
    """Every allowed (tensor, pipeline, ZeRO stage, micro-batch, checkpointing)."""
    for tensor, pipeline, zero in grids(processes):
        for pieces, checkpointing in TURNS:
            yield (
                tensor,
                pipeline,
                zero,
                micro_batch(processes, tensor, pipeline, pieces),
                checkpointing,
            )


def grids(processes):
    for tensor, pipeline in itertools.product((1, 2, 4), (WHOLE, STAGES)):
        if processes % (tensor * pipeline) == 0:
            for zero in (0, 1, 2, 3) if pipeline == WHOLE else (1,):
                yield tensor, pipeline, zero


def micro_batch(processes, tensor, pipeline, pieces):
    return SEQUENCES * tensor * pipeline // processes // pieces


def global_batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    # Skewed, so that there is something to learn.
    return (torch.rand(SEQUENCES, LENGTH + 1, generator=generator) ** 3 * 64).long()


def train(settings, loss_scale=None):
    """Losses, norms and the final state of one run in this process's group."""
    from megatron.core import parallel_state

    from configs import Config
    from launch.engine.engine import build

    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # DeepSpeed insists
    engine = build(Config.model_validate(settings))
    if loss_scale is not None:  # as fp16's scaler sets it, where the CPU has no fp16
        engine.optimizer.loss_scaler.cur_scale = loss_scale
        assert engine.loss_scale == loss_scale
    layout, micro_batch = engine.layout, settings["train"]["micro_batch_size"]
    losses, norms, ms_losses = [], [], []
    start = {name: whole(name, p, layout) for name, p in engine.named_parameters()}
    for step in range(STEPS):
        own = global_batch(step).chunk(layout.data_size)[layout.data_rank]
        losses.append(float(engine.train_step(iter(own.split(micro_batch)), RATE)))
        norms.append(float(engine.gradient_norm()))
        ms_losses.append(float(engine.ms_loss()))
    found = {
        "losses": losses,
        "norms": norms,
        "ms_losses": ms_losses,
        "state": engine.controller.state_dict(),
        "metrics": engine.controller.metrics(),
        "start": start,
        "parameters": {name: whole(name, p, layout) for name, p in engine.named_parameters()},
    }
    engine.deepspeed.destroy()
    parallel_state.destroy_model_parallel()
    return found


def whole(name, parameter, layout):
    """A parameter with its tensor-parallel shards joined, in float32; None if it is ZeRO-3's."""
    if hasattr(parameter, "ds_id"):
        return None
    value = parameter.detach().float().clone()
    if getattr(parameter, "tensor_model_parallel", False) and layout.tensor_size > 1:
        shards = [torch.empty_like(value) for _ in range(layout.tensor_size)]
        torch.distributed.all_gather(shards, value.contiguous(), group=layout.tensor_group)
        value = torch.cat(shards, dim=parameter.partition_dim)
    return value[: SHAPE["vocab_size"]] if "embed" in name else value  # without padding rows


def train_all(runs):
    """By turns with either of `KERNELS`."""
    return [
        train(configuration(*layout, **{"kernels": kernels} | settings), **options)
        for (layout, settings, options), kernels in zip(
            runs, itertools.cycle(KERNELS), strict=False
        )
    ]


def plain_run(weights, weight, scale_invariant=False, gradient_ratio=None):
    """The reference: transformers' model, float64, one process, one batch a step."""
    model = gpt_neox(layers=4, max_position_embeddings=LENGTH, attn_implementation="eager").double()
    model.load_state_dict({OUTPUT.get(n, n): value.double() for n, value in weights.items()})
    references, activations = {}, {}
    for number in INHIBITED:
        references[number] = Reference(
            late_start=3,
            forget=5,
            weight=0.0003 if weight is None else weight,
            inhibited_layers=len(INHIBITED),
            scale_invariant=scale_invariant,
            gradient_ratio=gradient_ratio,
        )
        model.gpt_neox.layers[number].mlp.act.register_forward_hook(
            lambda module, inputs, z, number=number: _keep(activations, number, z)
        )
    found = {"losses": [], "norms": [], "ms_losses": []}
    for step in range(STEPS):
        batch = global_batch(step)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        z = {number: value.flatten(0, 1) for number, (value, _) in activations.items()}
        values = {number: value.detach().numpy() for number, value in z.items()}
        pull = sum(
            (torch.from_numpy(references[n].loss_slope(values[n])) * z[n]).sum() for n in INHIBITED
        )
        model.zero_grad()
        (loss + pull).backward()
        squares = sum(p.grad.square().sum() for p in model.parameters())
        found["losses"].append(loss.item())
        found["norms"].append(math.sqrt(float(squares)))
        found["ms_losses"].append(sum(references[n].loss(values[n]) for n in INHIBITED))
        found["share"] = {n: references[n].selected(values[n]).mean() for n in INHIBITED}
        found["weight"] = {n: references[n].weight for n in INHIBITED}
        for number in INHIBITED:
            if gradient_ratio is not None and references[number].tau is not None:
                arrived = activations[number][1].grad.flatten(0, 1).numpy()
                references[number].compare(values[number], arrived)
            references[number].step(values[number])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    found["parameters"] = dict(model.named_parameters())
    for name, theirs in OUTPUT.items():
        found["parameters"][name] = found["parameters"].pop(theirs)
    found["layers"] = references
    return found


def _keep(activations, number, z):
    """What goes on from here is a tensor of its own, whose gradient L_MS at z has no part in."""
    onward = z.view_as(z)
    onward.retain_grad()
    activations[number] = z, onward
    return onward


FORMS = {
    "published": {},
    "scale invariant": {"scale_invariant": True},
    "weight 0": {"weight": 0.0},
    "gradient ratio": {"weight": None, "gradient_ratio": 0.3},
}
ON_FOUR = [
    ((2, WHOLE, 2, 4, True), {"dtype": "bf16"}, {}),
    ((1, STAGES, 1, 4, False), {"dtype": "bf16"}, {}),
    ((1, WHOLE, 0, 1, True), {}, {}),
    ((1, WHOLE, 2, 4, False), {}, {}),
    ((1, STAGES, 1, 2, True), {}, {}),
    ((2, WHOLE, 1, 2, False), {}, {}),
    ((2, WHOLE, 3, 4, True), {}, {}),
    ((2, STAGES, 1, 8, False), {}, {}),
    ((4, WHOLE, 0, 16, False), {}, {}),
    ((4, WHOLE, 2, 8, True), {}, {}),
    ((2, STAGES, 1, 4, True), FORMS["scale invariant"], {}),
    ((2, WHOLE, 2, 4, False), FORMS["scale invariant"], {}),
    ((1, STAGES, 1, 2, False), FORMS["weight 0"], {}),
    ((2, WHOLE, 1, 4, False), {}, {"loss_scale": 1024.0}),
    ((2, STAGES, 1, 4, False), {}, {"loss_scale": 1024.0}),
    ((1, WHOLE, 2, 1, True), FORMS["gradient ratio"], {}),
    ((2, STAGES, 1, 2, True), FORMS["gradient ratio"], {}),
    ((4, WHOLE, 0, 8, False), FORMS["gradient ratio"], {}),
    ((2, WHOLE, 1, 4, True), FORMS["gradient ratio"], {"loss_scale": 1024.0}),
]
ON_TWO = [
    ((1, WHOLE, 3, 2, False), {}, {}),
    ((2, WHOLE, 2, 4, True), {}, {}),
    ((1, STAGES, 1, 4, False), {}, {}),
    ((1, WHOLE, 3, 2, True), FORMS["gradient ratio"], {}),
    ((1, STAGES, 1, 4, False), FORMS["gradient ratio"], {}),
]


@pytest.fixture(scope="module")
def references(on_two):
    """The plain runs, from the model's own initial weights."""
    return all_references(on_two[-1])


def all_references(ranks):
    weights = initial_weights(ranks)
    return {
        name: plain_run(weights, **{"weight": L2E["weight"]} | form) for name, form in FORMS.items()
    }


def initial_weights(ranks):
    """From one layout's ranks, whose pipeline stages hold different layers."""
    return {name: value for rank in ranks for name, value in rank["start"].items()}


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return by_run(run_on_processes(train_all, 4, tmp_path_factory.mktemp("four"), ON_FOUR))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return by_run(run_on_processes(train_all, 2, tmp_path_factory.mktemp("two"), ON_TWO))


def by_run(ranks):
    """[rank][run] -> [run][rank]."""
    return [list(run) for run in zip(*ranks, strict=True)]


def errors_of(ranks, reference):
    """The largest relative error of each quantity, over all steps, layers and ranks."""
    errors = {"ms_loss": distance(total_ms_losses(ranks), reference["ms_losses"])}
    for rank in ranks:
        found = {
            "loss": distance(rank["losses"], reference["losses"]),
            "norm": distance(rank["norms"], reference["norms"]),
        }
        for name, value in rank["parameters"].items():
            if value is not None:
                expected = reference["parameters"][name].detach().numpy()
                found[name] = distance(value.numpy(), expected)
        for number, expected in reference["layers"].items():
            if f"{number}.mean" in rank["state"]:
                for key in ("mean", "var", "tau", "share"):
                    value = rank["state"][f"{number}.{key}"].numpy()
                    found[f"{number}.{key}"] = distance(value, getattr(expected, key))
                weight = rank["metrics"][str(number)]["weight"]
                found[f"{number}.weight"] = distance(weight, reference["weight"][number])
                for key in ("lm_gradient", "ms_gradient") if expected.compared else ():
                    value = float(rank["state"][f"{number}.{key}"]) / (SEQUENCES * LENGTH)
                    found[f"{number}.{key}"] = distance(value, getattr(expected, key))
                share = rank["metrics"][str(number)]["selected_fraction"]
                found[f"{number}.selected"] = abs(share / reference["share"][number] - 1)
                assert rank["state"][f"{number}.samples"] == expected.m
        errors |= {key: max(value, errors.get(key, 0)) for key, value in found.items()}
    return errors


def total_ms_losses(ranks):
    """L_MS of all pipeline stages: each layer's is held by all its data and tensor ranks."""
    stages = {frozenset(rank["metrics"]): np.array(rank["ms_losses"]) for rank in ranks}
    return sum(stages.values())


def distance(found, expected):
    """Relative error of arrays by their norm."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def reference_of(settings):
    return next(name for name, form in FORMS.items() if form == settings)


def worst(errors):
    name = max(errors, key=errors.get)
    return f"{name}: {errors[name]:.1e}"


@pytest.mark.parametrize("run", range(len(ON_TWO)))
def test_two_processes_equal_one(run, on_two, references):
    layout, settings, _ = ON_TWO[run]
    assert_close(on_two[run], references[reference_of(settings)], layout)


@pytest.mark.parametrize("run", [i for i, r in enumerate(ON_FOUR) if "dtype" not in r[1]])
def test_four_processes_equal_one(run, on_four, references):
    layout, settings, _ = ON_FOUR[run]
    assert_close(on_four[run], references[reference_of(settings)], layout)


def assert_close(ranks, reference, layout):
    errors = errors_of(ranks, reference)
    assert max(errors.values()) < 1e-5, f"{layout}: {worst(errors)}"


@pytest.mark.parametrize("run", [i for i, r in enumerate(ON_FOUR) if "dtype" in r[1]])
def test_bf16_agrees_within_its_precision(run, on_four, references):
    """Before rounding decides what is selected, the norm shows L_MS at its full size."""
    step = L2E["late_start_step"]
    norms = on_four[run][0]["norms"][: step + 1]
    assert distance(norms, references["published"]["norms"][: step + 1]) < 0.03


def test_a_loss_that_vanished_would_show(references):
    """The control: without L_MS the runs are told apart by far more than any tolerance here."""
    with_loss, without = references["published"], references["weight 0"]
    start = L2E["late_start_step"]
    assert with_loss["norms"][:start] == without["norms"][:start]
    assert abs(with_loss["norms"][start] / without["norms"][start] - 1) > 0.3
    assert distance(references["scale invariant"]["norms"], with_loss["norms"]) > 0.01


AT_ONCE = 12  # by one set of processes: every layout's groups leave threads behind


def main(form="published", *counts):
    """Run the whole matrix and print the worst error of each layout."""
    reference = None
    for processes in map(int, counts or (1, 2, 4)):
        runs = [(layout, FORMS[form], {}) for layout in whole_matrix(processes)]
        results = []
        for begin in range(0, len(runs), AT_ONCE):
            with tempfile.TemporaryDirectory() as folder:
                some = runs[begin : begin + AT_ONCE]
                results += by_run(run_on_processes(train_all, processes, Path(folder), some))
        reference = reference or all_references(results[0])[form]
        for (layout, _, _), ranks in zip(runs, results, strict=True):
            tensor, pipeline, zero, micro_batch, checkpointing = layout
            print(
                f"TP{tensor} PP{pipeline} DP{processes // tensor // pipeline} ZeRO-{zero} "
                f"micro-batch {micro_batch:2} checkpointing {checkpointing!s:5} "
                f"worst {worst(errors_of(ranks, reference))}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
