"""A gradient that is not finite on one rank changes no weight on any, whatever the optimizer."""

import torch

from tests.distributed.checkpointing import differences, everything, make_config, running, train
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
            before = {k: v for k, v in everything(engine).items() if not k.startswith("l2e ")}
            hook = None
            if dist.get_rank() == 1:
                parameters = dict(engine.named_parameters())
                victim = next(
                    p for n, p in parameters.items() if n.endswith("attention.dense.weight")
                )
                hook = victim.register_hook(lambda g, value=value: g.index_fill(0, FIRST, value))
            train(engine, 2, 1)
            noticed = engine.dropped_update
            after = {k: v for k, v in everything(engine).items() if not k.startswith("l2e ")}
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
