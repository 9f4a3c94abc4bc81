"""The benchmark report shows what the JSON files hold."""

import json

from bench import layer_speed, loading_speed
from bench.machine import default_device
from bench.report import write_report

CONSTANT = {"median": 2.0, "low": 1.5, "high": 2.5}
MACHINE = {
    "name": "Abacus 9",
    "cores": 2,
    "threads": 1,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "triton": None},
    "date": "2026-11-20",
}
TRAIN = {
    "preset": "14m",
    "dtype": "fp32",
    "batch_size": 2,
    "sequence_length": 1024,
    "rounds": 15,
    "absent": {"megatron-core": "RuntimeError: needs CUDA"},
    "seconds_a_step": {"transformers": CONSTANT, "ours": CONSTANT, "ours + l2e mid2": CONSTANT},
    "tokens_per_second": {"transformers": 900.0, "ours": 1234.0, "ours + l2e mid2": 1200.0},
    "measured_peak_tflops": 0.1,
    "share_of_peak": {"transformers": 0.3, "ours": 0.4, "ours + l2e mid2": 0.39},
    "fastest_peer": "transformers",
    "ours_over_fastest_peer": CONSTANT,
    "added_percent": {"ours + l2e mid2": {"median": 0.7, "low": 0.1, "high": 1.3}},
}
COMPILED = TRAIN | {
    "speed_over_peers": {
        "ours": {"transformers": CONSTANT},
        "ours, compiled": {"transformers": {"median": 1.25, "low": 1.1, "high": 1.4}},
    },
    "pairs": {"rounds": 99, "added_percent": {"median": 0.6, "low": 0.5, "high": 0.7}},
}


def test_every_section_finds_its_way_into_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_speed, "NEURONS", (8, 16))
    monkeypatch.setattr(loading_speed, "TOKENS", 2**20)
    results = {
        "machine": MACHINE,
        "commands": {"train": "--only train --rounds 15"},
        "train": [TRAIN, COMPILED],
        "layer": layer_speed.measure("fp32", 1, default_device(), entries=2**10),
        "loading": loading_speed.measure(rounds=1, steps=1),
        "scaling": [
            {"processes": 1, "tokens_per_second": CONSTANT},
            {"processes": 2, "tokens_per_second": {"median": 3.0, "low": 3.0, "high": 3.0}},
        ],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    write_report(tmp_path, tmp_path / "docs" / "benchmarks.md")
    report = (tmp_path / "docs" / "benchmarks.md").read_text()
    for expected in (
        "## Abacus 9",
        "2026-11-20, `bench/run.py --only train --rounds 15`",
        "torch 2.13.0",
        "| ours + l2e mid2 | 2.000 [1.500, 2.500] | 1,200 | 39.0% | 0.70 [0.10, 1.30] |",
        "a peer: ours over transformers 2.00 [1.50, 2.50]. Measured",
        "a peer: ours over transformers 2.00 [1.50, 2.50]; ours, compiled over transformers 1.25 [",
        "In 99 further rounds of ours and ours + l2e mid2 alone, the latter takes 0.60 [0.50,",
        "Not measured: megatron-core (RuntimeError: needs CUDA).",
        "| neurons | dtype | GELU | threshold | top 1 | top 50 |",
        "| 2 | 3 [3, 3] | 1.50 x |",
    ):
        assert expected in report
    assert "None" not in report
    assert report.count("\n| 8 | fp32 |") == report.count("\n| 16 | fp32 |") == 1
    assert results["loading"]["tokens_per_second"]["median"] > 0
