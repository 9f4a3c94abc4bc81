"""Layers sharded over real process groups against the plain float64 reference."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from l2e import Controller, L2EConfig, L2ELayer, Sharding, attach
from tests.distributed.processes import run_on_processes
from tests.l2e.reference import Reference, gelu, gelu_slope

NEURONS, TOKENS, STEPS, LAYERS = 16, 480, 10, 2
SETTINGS = {"late_start_step": 3, "forget_step": 4, "weight": 0.5}
# Far from zero in some neurons, so that sums taken around the wrong centre would show.
OFFSET = np.linspace(0, 1, NEURONS) ** 3 * 50


def global_batch(step, layer):
    rng = np.random.default_rng(100 * step + layer)
    scale = np.linspace(0.5, 3, NEURONS)
    return (OFFSET + scale * rng.standard_t(4, (TOKENS, NEURONS))).astype(np.float32)


def shardings():
    """(tensor-parallel, data-parallel) sizes and the groups; without processes just one."""
    if not dist.is_initialized():
        return [((1, 1), Sharding())]
    return [(sizes, sharding_of(*sizes)) for sizes in ((1, 4), (2, 2), (4, 1))]


def sharding_of(tensor_size, data_size):
    """This rank's groups: tensor-parallel ranks are neighbours, as in megatron-core."""
    ranks = torch.arange(data_size * tensor_size).view(data_size, tensor_size)
    tensor_groups = [dist.new_group(row.tolist()) for row in ranks]
    data_groups = [dist.new_group(column.tolist()) for column in ranks.T]
    data_rank, tensor_rank = divmod(dist.get_rank(), tensor_size)
    return Sharding(data_groups[tensor_rank], tensor_groups[data_rank])


def build(sharding, **settings):
    config = L2EConfig(**SETTINGS | settings)
    layers = [
        L2ELayer(
            NEURONS // sharding.tensor_size,
            config,
            name=str(number),
            inhibited_layers=LAYERS,
            total_neurons=NEURONS,
        )
        for number in range(LAYERS)
    ]
    return layers, Controller(layers, config, sharding)


def own_part(values, sharding):
    """This rank's tokens and neurons of a global [TOKENS, NEURONS] array."""
    tokens = np.array_split(values, sharding.data_size)[sharding.data_rank]
    return np.split(tokens, sharding.tensor_size, axis=1)[sharding.tensor_rank]


def train(layers, controller, sharding, steps, micro_batches=1):
    """Each step's injected gradients (this rank's), losses and metrics."""
    history = []
    for step in steps:
        controller.gradient_scale = 1 / micro_batches
        controller.measure = step % 2 == 1
        gradients = []
        for number, layer in enumerate(layers):
            x = torch.tensor(own_part(global_batch(step, number), sharding), requires_grad=True)
            for part in x.chunk(micro_batches):
                out = layer(part)
                out.backward(torch.zeros_like(out))
            gradients.append(x.grad.numpy())
        controller.step()
        history.append((gradients, float(controller.ms_loss()), controller.metrics()))
    return history


def train_in_every_layout():
    """{(layout, micro-batches, scale_invariant): (gradients, loss, metrics, state)}."""
    results = {}
    for layout, sharding in shardings():
        for micro_batches, invariant in product((1, 4), (False, True)):
            layers, controller = build(sharding, scale_invariant=invariant)
            history = train(layers, controller, sharding, range(STEPS), micro_batches)
            results[layout, micro_batches, invariant] = (
                sharding.tensor_rank,
                sharding.data_rank,
                *history[-1],
                controller.state_dict(),
            )
    return results


@pytest.fixture(scope="module")
def references():
    """The float64 run, per form of the loss: last step's (gradients, loss) and the state."""
    found = {}
    for invariant in (False, True):
        plain = [
            Reference(
                late_start=3,
                forget=4,
                weight=0.5,
                inhibited_layers=LAYERS,
                scale_invariant=invariant,
            )
            for _ in range(LAYERS)
        ]
        for step in range(STEPS):
            pre = [global_batch(step, number).astype(np.float64) for number in range(LAYERS)]
            z = [gelu(p) for p in pre]
            gradients = [
                r.loss_slope(a) * gelu_slope(p) for r, a, p in zip(plain, z, pre, strict=True)
            ]
            loss = sum(r.loss(a) for r, a in zip(plain, z, strict=True))
            phi = [r.phi(a) if r.steps else None for r, a in zip(plain, z, strict=True)]
            for r, a in zip(plain, z, strict=True):
                r.step(a)
        found[invariant] = plain, gradients, loss, phi
    return found


def test_every_layout_equals_the_reference(references, on_four_ranks):
    for result in [train_in_every_layout(), *of(on_four_ranks, train_in_every_layout)]:
        for ((tensor, data), _, invariant), found in result.items():
            tensor_rank, data_rank, gradients, loss, metrics, state = found
            plain, expected, expected_loss, phi = references[invariant]
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            for number, reference in enumerate(plain):
                part = np.array_split(expected[number], data)[data_rank]
                part = np.split(part, tensor, axis=1)[tensor_rank]
                # A rank's mean over its tokens; the engine averages over data-parallel ranks.
                # Entries in which z - mean all but cancels keep fewer digits in float32.
                error = gradients[number] / data - part
                assert np.linalg.norm(error) < 1e-5 * np.linalg.norm(part), (tensor, data)
                name = str(number)
                np.testing.assert_allclose(state[f"{name}.mean"], reference.mean, rtol=1e-5)
                np.testing.assert_allclose(state[f"{name}.var"], reference.var, rtol=1e-5)
                np.testing.assert_allclose(state[f"{name}.share"], reference.share, rtol=1e-4)
                assert float(state[f"{name}.tau"]) == pytest.approx(reference.tau, rel=1e-5)
                assert float(state[f"{name}.samples"]) == reference.m
                numbers = metrics[name]
                assert numbers["max_ms"] == pytest.approx(phi[number].max(), rel=1e-5)
                assert numbers["mean_ms"] == pytest.approx(phi[number].mean(), rel=1e-5)


class Shards(torch.nn.Module):
    """Somebody's own model, of whose neurons each tensor-parallel rank has some."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = torch.nn.ModuleList(torch.nn.GELU() for _ in range(LAYERS))

    def forward(self, number, pre):
        return self.acts[number](pre)


def attach_to_shards():
    sharding, model = sharding_of(2, 2), Shards().train()
    config = L2EConfig(layers="all", **SETTINGS)
    handle = attach(model, "acts.*", config, inject=True, sharding=sharding)
    handle.controller.gradient_scale = 1.0
    for step in range(STEPS):
        handle.controller.measure = step % 2 == 1
        for number in range(LAYERS):
            x = torch.tensor(own_part(global_batch(step, number), sharding), requires_grad=True)
            out = model(number, x)
            out.backward(torch.zeros_like(out))
        handle.step()
    return float(handle.controller.ms_loss()), handle.metrics(), handle.state_dict()


def test_what_is_attached_to_shards_equals_our_own_layers(on_four_ranks):
    """The width of the whole layer is found in the data, and the shards' number."""
    own = of(on_four_ranks, train_in_every_layout)[0][(2, 2), 1, False]
    *_, expected_loss, expected_metrics, expected = own
    for loss, metrics, state in of(on_four_ranks, attach_to_shards):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, value in expected.items():
            found = state[name if name == "step" else f"acts.{name}"]
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6, err_msg=name)
        for name, numbers in expected_metrics.items():
            for key, value in metrics[f"acts.{name}"].items():
                assert value == pytest.approx(numbers[key], rel=1e-4, nan_ok=True), key


def test_metrics_are_the_same_on_all_ranks(on_four_ranks):
    results = of(on_four_ranks, train_in_every_layout)
    for key, (_, _, _, loss, metrics, state) in results[0].items():
        for other in results[1:]:
            assert other[key][3] == loss
            assert repr(other[key][4]) == repr(metrics)  # repr: NaN equals NaN
            assert all(torch.equal(state[name], other[key][5][name]) for name in state)


def count_collectives():
    """How often each collective of torch.distributed runs, step by step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return collectives_of_each_step(monkeypatch)


def collectives_of_each_step(monkeypatch):
    counts = Counter()
    for name in ("all_reduce", "broadcast", "all_gather", "reduce", "all_gather_into_tensor"):
        original = getattr(dist, name)

        def counted(tensor, *args, _original=original, _name=name, **kwargs):
            counts[_name, kwargs["group"]] += 1
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(dist, name, counted)
    sharding = sharding_of(2, 2)
    names = {sharding.data_group: "data", sharding.tensor_group: "tensor"}
    layers, controller = build(sharding, late_start_step=4)
    seen = []
    for step in range(8):
        counts.clear()
        train(layers, controller, sharding, [step])
        seen.append({(name, names[group]): n for (name, group), n in counts.items()})
    return seen


def test_a_step_has_one_flat_all_reduce_over_data_and_one_over_tensor_ranks(on_four_ranks):
    for first, *others in of(on_four_ranks, count_collectives):
        once = {("all_reduce", "data"): 1, ("all_reduce", "tensor"): 1}
        assert first == once | {("broadcast", "data"): 1}
        assert others == [once] * 7


def reshard():
    """Train 5 steps as TP2 x DP2, go on as TP4, as DP4 and as it was; the states at the end."""
    sharding = sharding_of(2, 2)
    layers, controller = build(sharding)
    train(layers, controller, sharding, range(5))
    saved = controller.state_dict()
    ends = []
    for layout in ((2, 2), (4, 1), (1, 4)):
        sharding = sharding_of(*layout)
        layers, controller = build(sharding)
        controller.load_state_dict(saved)
        train(layers, controller, sharding, range(5, STEPS))
        ends.append(controller.state_dict())
    return ends


def test_state_is_resharded_when_the_layout_changes(references, on_four_ranks):
    plain, *_ = references[False]
    for ends in of(on_four_ranks, reshard):
        for state in ends:
            assert int(state["step"]) == STEPS
            for number, reference in enumerate(plain):
                np.testing.assert_allclose(state[f"{number}.mean"], reference.mean, rtol=1e-5)
                np.testing.assert_allclose(state[f"{number}.var"], reference.var, rtol=1e-5)
                assert float(state[f"{number}.tau"]) == pytest.approx(reference.tau, rel=1e-5)


def select_top_k():
    """What each layout's layer lets through, gathered to [TOKENS, NEURONS]."""
    found = []
    for _, sharding in shardings():
        layers, controller = build(
            sharding, method="deactivate", selection="topk", topk=3, delta=0.0
        )
        train(layers, controller, sharding, range(4))
        x = torch.tensor(own_part(global_batch(4, 0), sharding))
        changed = (layers[0](x) != torch.nn.functional.gelu(x)).float()
        rows = sharding.gather_neurons(changed)
        found.append((sharding.data_rank, sharding.data_size, rows))
    return found


def test_top_k_runs_over_all_shards(on_four_ranks):
    [(_, _, alone)] = select_top_k()
    assert (alone.sum(1) == 3).all()
    for results in of(on_four_ranks, select_top_k):
        for rank, size, selected in results:
            assert torch.equal(selected, alone.chunk(size)[rank])


def meet_a_bad_activation():
    """One rank sees a NaN: every rank names it, and keeps its statistics."""
    sharding = sharding_of(2, 2)
    layers, controller = build(sharding)
    train(layers, controller, sharding, range(4))
    before = controller.state_dict()
    for number, layer in enumerate(layers):
        x = torch.tensor(own_part(global_batch(4, number), sharding))
        if number == 1 and dist.get_rank() == 3:
            x[0, 0] = float("nan")
        layer(x)
    controller.step()
    after = controller.state_dict()
    kept = all(torch.equal(before[name], after[name]) for name in before if name[0] == "1")
    moved = not torch.equal(before["0.mean"], after["0.mean"])
    try:
        controller.metrics()
    except ValueError as error:
        return kept, moved, str(error)


def test_every_rank_learns_of_a_bad_activation(on_four_ranks):
    for kept, moved, message in of(on_four_ranks, meet_a_bad_activation):
        assert kept
        assert moved
        assert "layer 1: NaN or Inf" in message
        assert "step 4" in message


SCENARIOS = (
    train_in_every_layout,
    attach_to_shards,
    count_collectives,
    reshard,
    select_top_k,
    meet_a_bad_activation,
)


def run_scenarios():
    """All of them on one set of processes, which take longer to start than to compute."""
    return {scenario.__name__: scenario() for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory):
    return run_on_processes(run_scenarios, 4, tmp_path_factory.mktemp("four"))


def of(ranks, scenario):
    """Every rank's result of one scenario."""
    return [results[scenario.__name__] for results in ranks]
