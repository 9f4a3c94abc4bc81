"""Estimated step times against speeds that others published and that were measured here."""

import json
from dataclasses import replace

import pytest

from launch.planning.cost import LayoutPlan, communication
from launch.planning.speed import GPUS, UNCERTAINTY, sent_seconds, step_seconds
from tests.launch.planning.test_cost import PYTHIA, Shape

H200 = GPUS["h200"]


def published(row: dict) -> tuple[float, float]:
    """(estimated, published) seconds of a step."""
    tensor, pipeline = row.get("tensor", 1), row.get("pipeline", 1)
    data = row["gpus"] // (tensor * pipeline)
    layout = LayoutPlan(
        sequence_length=row["sequence_length"],
        micro_batch_size=row["micro_batch"],
        accumulation=row.get("accumulation") or row["global_batch"] // (row["micro_batch"] * data),
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        sequence=tensor > 1,
        zero_stage=3 if "sharding" in row else 1,
    )
    hidden = row["hidden"]
    shape = Shape(row["layers"], hidden, row["heads"], 4 * hidden, row["vocab"])
    estimated = sum(step_seconds(shape, layout, GPUS[row["gpu"]]).values())
    if "step_seconds" in row:
        return estimated, row["step_seconds"]
    return estimated, layout.step_tokens / (row["gpus"] * row["tokens_per_second_per_gpu"])


def test_speeds_that_others_published(shared_data):
    rows = json.loads((shared_data / "published_throughput.json").read_text())["rows"]
    errors = {}
    for row in rows:
        estimated, found = published(row)
        errors[row["model"], row["gpu"], row["gpus"]] = estimated / found - 1
    assert len(errors) == 10
    assert max(map(abs, errors.values())) <= UNCERTAINTY, errors
    assert sum(map(abs, errors.values())) / len(errors) <= 0.1, errors


@pytest.mark.parametrize(
    ("size", "gpu", "micro_batch", "accumulation", "seconds"),
    [
        ("70m", "h200", 32, 2, 0.1066),
        ("70m", "h100", 32, 2, 0.1137),
        ("410m", "h100", 16, 1, 0.1819),
        ("2.8b", "h100", 4, 1, 0.2818),
    ],
)
def test_steps_measured_here(size, gpu, micro_batch, accumulation, seconds):
    """Of 2,048 tokens a sequence, two inhibited layers, on one GPU: docs/gpu.md."""
    layout = LayoutPlan(micro_batch_size=micro_batch, accumulation=accumulation, inhibited_layers=2)
    estimated = sum(step_seconds(PYTHIA[size], layout, GPUS[gpu]).values())
    assert estimated == pytest.approx(seconds, rel=UNCERTAINTY)


def test_compiled_blocks_move_fewer_bytes():
    """On layouts whose blocks are one graph each, unless train.compile is false."""
    fast = LayoutPlan(micro_batch_size=16)
    slow = replace(fast, compiling=False)
    seconds = [sum(step_seconds(PYTHIA["410m"], x, H200).values()) for x in (fast, slow)]
    assert seconds[0] < 0.95 * seconds[1]
    for split in ({"tensor": 2}, {"pipeline": 2}, {"zero_stage": 3}):
        pair = [replace(x, **split) for x in (fast, slow)]
        assert step_seconds(PYTHIA["410m"], pair[0], H200) == step_seconds(
            PYTHIA["410m"], pair[1], H200
        )


def test_a_group_of_whole_nodes_uses_all_their_ports():
    """Data-parallel ranks of two nodes leave them by eight ports at once, one of each by one."""
    alone = LayoutPlan(data=16, inhibited_layers=1)
    spread = replace(alone, tensor=8, data=2)
    for layout, speed in ((alone, 0.7 * 8 * 50e9), (spread, 0.7 * 50e9)):
        sent = communication(PYTHIA["410m"], layout)["data"]
        expected = pytest.approx(sent / min(speed, 0.7 * H200.link))
        assert sent_seconds(PYTHIA["410m"], layout, H200)["data"] == expected


def test_a_pipeline_idles_for_its_bubble():
    layout = LayoutPlan(pipeline=4, accumulation=8)
    seconds = step_seconds(PYTHIA["410m"], layout, H200)
    assert seconds["bubble"] == pytest.approx(3 / 8 * seconds["arithmetic"])


def test_small_products_are_slower_than_their_arithmetic():
    """The same tokens in fewer, larger micro-batches take no longer."""
    small = LayoutPlan(micro_batch_size=1, accumulation=32)
    large = LayoutPlan(micro_batch_size=32, accumulation=1)
    seconds = [step_seconds(PYTHIA["70m"], layout, H200)["arithmetic"] for layout in (small, large)]
    assert seconds[0] > 1.1 * seconds[1]


def test_inhibited_layers_cost_their_share():
    def of(layers: int) -> dict[str, float]:
        return step_seconds(PYTHIA["70m"], LayoutPlan(inhibited_layers=layers, data=8), H200)

    assert of(0)["l2e"] == 0
    assert of(6)["l2e"] == pytest.approx(3 * of(2)["l2e"], rel=1e-6)
