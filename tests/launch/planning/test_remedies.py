"""What is advised where memory runs out: rules kept, memory freed, the cheapest first."""

import json

import pytest

import configs
from launch.planning import cost
from launch.planning.cost import LayoutPlan
from launch.planning.layouts import layout_of
from launch.planning.remedies import advice, remedies
from tests.launch.planning.test_cost import Shape

LAYOUTS = {
    "one GPU": LayoutPlan(micro_batch_size=32, accumulation=4),
    "one sequence": LayoutPlan(micro_batch_size=1, accumulation=128, checkpointing=True),
    "data": LayoutPlan(micro_batch_size=8, accumulation=2, data=8),
    "ZeRO-3": LayoutPlan(micro_batch_size=8, accumulation=2, data=8, zero_stage=3),
    "pipeline": LayoutPlan(micro_batch_size=4, accumulation=8, pipeline=4, data=2),
    "tensor": LayoutPlan(micro_batch_size=4, accumulation=8, tensor=4, data=2),
    "nothing left": LayoutPlan(
        micro_batch_size=1, tensor=8, checkpointing=True, sequence=True, sequence_length=1
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_remedies_free_memory_and_the_cheapest_come_first(layout) -> None:
    model = Shape(16, 2048, 8, 8192)
    before = sum(cost.peak_memory(model, layout).values())
    found = remedies(model, layout)
    for remedy in found:
        assert remedy.bytes < before
    alike = [remedy.alike for remedy in found]
    assert alike == sorted(alike, reverse=True)
    times = [remedy.time for remedy in found if remedy.alike]
    assert times == sorted(times)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}])
def test_every_remedy_is_a_configuration_that_is_accepted(tmp_path, ranks, parallel) -> None:
    """With the planned memory that its line promises."""
    sections = {
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
        "train": {"steps": 4, "global_batch_size": 16, "micro_batch_size": 4, "dtype": "fp32"},
        "data": {"path": "builtin", "sequence_length": 64},
        "tokenizer": {"vocab_size": 512},
        "parallel": parallel,
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(sections))
    needed = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    if ranks % needed:
        pytest.skip("not a layout of so many ranks")
    config = configs.load(path, processes=ranks)
    found = remedies(config.model, layout_of(config, ranks))
    assert len(found) == 3
    for remedy in found:
        change, _, processes = remedy.change.partition(" on ")
        settings = [change] if "=" in change else []
        count = (processes or change).split()[0] if processes or not settings else str(ranks)
        changed = configs.load(path, settings, processes=int(count))
        planned = cost.peak_memory(changed.model, layout_of(changed, int(count)))
        assert sum(planned.values()) == remedy.bytes, remedy


def test_the_advice_names_every_part_and_what_it_costs(tmp_path) -> None:
    own_data = ["data.path=builtin", "data.order=neox", "tokenizer.vocab_size=50304"]
    config = configs.load("configs/410m.json", own_data)
    told = advice(config, 1)
    parts = cost.peak_memory(config.model, layout_of(config, 1))
    for name, size in parts.items():
        assert f"{name} {size / 2**30:.2f}" in told
    assert told.count("time a step") + told.count("another run") == 3
