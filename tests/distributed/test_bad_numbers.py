"""A gradient that is not finite on one rank changes no weight on any, whatever the optimizer."""

from contextlib import contextmanager

import torch

from tests.distributed.checkpointing import (
    differences,
    everything,
    make_config,
    running,
    train,
    trained_state,
)
from tests.distributed.processes import run_on_processes

SETTINGS = {
    "zero-0": {"zero": 0},
    "zero-0 sgd": {"zero": 0, "optimizer": {"type": "sgd"}},
    "zero-1": {"zero": 1},
    "zero-2 bf16": {"zero": 2, "dtype": "bf16"},
    "zero-3": {"zero": 3},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "pipeline bf16": {"pipeline": 2, "dtype": "bf16"},
}


def poison(settings: dict[str, dict]) -> dict[str, dict]:
    """Two clean steps, one in which the last rank's gradient holds one NaN or infinity, another."""
    import torch.distributed as dist

    found = {}
    for number, (name, keys) in enumerate(settings.items()):
        value = float("nan") if number % 2 else float("inf")
        with running(make_config(**keys)) as engine:
            train(engine, 0, 2)
            before = trained_state(engine)
            hook = None
            if dist.get_rank() == 1:
                parameters = dict(engine.named_parameters())
                victim = next(
                    p for n, p in parameters.items() if n.endswith("attention.dense.weight")
                )
                hook = victim.register_hook(lambda g, value=value: g.index_fill(0, FIRST, value))
            train(engine, 2, 1)
            noticed = engine.dropped_update
            after = trained_state(engine)
            if hook is not None:
                hook.remove()
            losses = train(engine, 3, 1)
            moved = everything(engine)
            found[name] = {
                "changed": differences(before, after),
                "noticed": noticed,
                "goes on": losses[0] < float("inf") and not engine.dropped_update,
                "moves again": any(not torch.equal(after[k], moved[k]) for k in after),
            }
    return found


FIRST = torch.tensor([0])


def test_no_rank_makes_an_update_from_bad_gradients(tmp_path) -> None:
    for rank in run_on_processes(poison, 2, tmp_path, SETTINGS):
        for name, found in rank.items():
            expected = {"changed": [], "noticed": True, "goes on": True, "moves again": True}
            assert found == expected, name


COPIES = {
    "zero-0": {"tensor": 2, "zero": 0},
    "zero-1": {"tensor": 2},
    "zero-1 bf16": {"tensor": 2, "dtype": "bf16"},
    "zero-2": {"tensor": 2, "zero": 2},
    "zero-3 bf16": {"tensor": 2, "zero": 3, "dtype": "bf16"},
    "checkpointing": {"tensor": 2, "recompute": True},
}
HELD_ALIKE = (
    "layers.0.input_layernorm.weight",
    "layers.1.post_attention_layernorm.bias",
    "layers.1.attention.dense.bias",
    "final_layer_norm.weight",
)


class Broken(torch.autograd.Function):
    """A weight whose gradient comes out wrong."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_fill(0, FIRST, float("inf"))


def spoil_copies(settings: dict[str, dict]) -> dict[str, list]:
    """Steps in which the second tensor rank alone computes one such gradient wrong."""
    import torch.distributed as dist

    found = {}
    for name, keys in settings.items():
        with running(make_config(**keys)) as engine:
            for victim in HELD_ALIKE:
                train(engine, 0, 1)
                clean = not engine.dropped_update
                before = trained_state(engine)
                with broken_gradient(engine.model, victim, dist.get_rank() == 1):
                    train(engine, 1, 1)
                after = trained_state(engine)
                noticed = clean and engine.dropped_update
                found[f"{name}, {victim}"] = [noticed, differences(before, after)]
    return found


@contextmanager
def broken_gradient(model: torch.nn.Module, name: str, here: bool):
    """Inside, the module uses its parameter through `Broken`, if `here`."""
    place, _, attribute = name.rpartition(".")
    (module,) = (found for path, found in model.named_modules() if path.endswith(place))
    forward, parameter = module.forward, getattr(module, attribute)

    def broken(*inputs, **named):
        del module._parameters[attribute]
        setattr(module, attribute, Broken.apply(parameter))
        try:
            return forward(*inputs, **named)
        finally:
            delattr(module, attribute)
            module.register_parameter(attribute, parameter)

    if here:
        module.forward = broken
    yield
    module.forward = forward


def test_a_bad_copy_of_a_gradient_is_seen_whichever_rank_has_it(tmp_path) -> None:
    """The norm takes such gradients from the first tensor rank, where this one is in order."""
    for rank in run_on_processes(spoil_copies, 2, tmp_path, COPIES):
        assert rank == {name: [True, []] for name in rank}
        assert len(rank) == len(COPIES) * len(HELD_ALIKE)
