"""A checkpoint moves to any layout: the next losses and statistics, and every tensor, are the same.

One layout trains and saves. Every other one loads that, writes it again (bit for bit the same
tensors, so that going from it to any third is the same as from the first), and trains on.
"""

from itertools import product
from pathlib import Path

import pytest
from safetensors import safe_open

from launch import checkpoint
from launch.checkpoint.saving import gather_l2e
from launch.checkpoint.stored import RANDOM, StoredCheckpoint
from tests.distributed.checkpointing import folder_of, make_config, running, train
from tests.distributed.processes import run_on_processes

BEFORE, AFTER = 4, 10


def layouts(processes: int) -> dict[str, dict]:
    """Every layout of so many processes of TP {1, 2, 4}, PP {1, 2}, ZeRO {1, 2, 3}."""
    found = {}
    for tensor, pipeline in product((1, 2, 4), (1, 2)):
        data, left_over = divmod(processes, tensor * pipeline)
        if left_over == 0:
            for zero in (1,) if pipeline > 1 else (1, 2, 3):
                name = f"tensor {tensor}, pipeline {pipeline}, data {data}, ZeRO-{zero}"
                found[name] = {"tensor": tensor, "pipeline": pipeline, "zero": zero}
    return found


# By number of processes: all that DeepSpeed can do on up to four, and one without ZeRO.
LAYOUTS = {count: layouts(count) for count in (4, 2, 1)}
LAYOUTS[1]["one process, ZeRO-0"] = {"zero": 0}
SOURCE = "tensor 2, pipeline 1, data 2, ZeRO-1"
LAYOUTS[4] = {SOURCE: LAYOUTS[4].pop(SOURCE)} | LAYOUTS[4]  # first, for the others to load


def l2e_state(engine) -> dict:
    return {name: tensor.tolist() for name, tensor in gather_l2e(engine).items()}


def save_and_train(folder: str, keys: dict, source: Path | None) -> dict:
    """From the start, or from `source`: save after `BEFORE` steps, then the next losses."""
    with running(make_config(**keys)) as engine:
        if source is None:
            train(engine, 0, BEFORE)
        else:
            checkpoint.load(engine, source)
        saved = checkpoint.save(engine, folder_of(folder), {"step": BEFORE, "tokens": 0})
        losses = train(engine, BEFORE, AFTER)
        return {"saved": saved, "losses": losses, "l2e": l2e_state(engine)}


def all_layouts(folder: str, layouts: dict[str, dict], source: Path | None) -> dict[str, dict]:
    outcomes: dict[str, dict] = {}
    for name, keys in layouts.items():
        outcomes[name] = save_and_train(f"{folder}/{name}", keys, source)
        source = source or outcomes[name]["saved"]
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("reshard")
    found: dict[str, dict] = {}
    for count, layouts in LAYOUTS.items():
        source = found[SOURCE]["saved"] if found else None
        found |= run_on_processes(all_layouts, count, folder, str(folder), layouts, source)[0]
    return found


NAMES = [name for layouts in LAYOUTS.values() for name in layouts if name != SOURCE]


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint but the random states, as bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        if path.name != RANDOM:
            with safe_open(path, framework="pt") as file:
                kind = path.name.split("-")[0]
                for name in file.keys():  # noqa: SIM118
                    found[f"{kind} {name}"] = file.get_tensor(name).numpy().tobytes()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_survives(outcomes, name):
    before, after = tensors(outcomes[SOURCE]["saved"]), tensors(outcomes[name]["saved"])
    # 28 parameters with two moments each, and L2E's of two layers
    assert len([key for key in before if key.startswith("model")]) == 28
    assert after.keys() == before.keys()
    assert [key for key in before if after[key] != before[key]] == []


@pytest.mark.parametrize("name", NAMES)
def test_next_losses_and_statistics(outcomes, name):
    expected, found = outcomes[SOURCE], outcomes[name]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["l2e"].keys() == expected["l2e"].keys()
    for key, value in expected["l2e"].items():
        assert found["l2e"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_stored_form_shows_no_layout(outcomes):
    """What lies on disk has the model's own shapes: no padding, no shards."""
    stored = StoredCheckpoint(outcomes[SOURCE]["saved"])
    shapes = {name: part.get_shape() for name, part in stored.tensors["model"].items()}
    assert shapes["gpt_neox.embed_in.weight"] == [300, 32]
    assert shapes["gpt_neox.layers.0.attention.query_key_value.weight"] == [96, 32]
    assert shapes["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"] == [32, 128]
    assert stored.state["layout"] == {"tensor": 2, "pipeline": 1, "data": 2}
