"""The training-speed script runs and writes the numbers that its goals speak of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_script_writes_its_result(tmp_path):
    output = tmp_path / "speed.json"
    command = [sys.executable, ROOT / "bench" / "train_speed.py", "--output", output]
    command += ["--batch-size", "1", "--sequence-length", "16", "--rounds", "2", "--threads", "1"]
    command += ["--eager", "--pairs", "3"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(output.read_text())
    for name, seconds in result["seconds_a_step"].items():
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert result["tokens_per_second"][name] == pytest.approx(16 / seconds["median"])
        assert 0 < result["share_of_peak"][name] < 1.5
    inhibited = {"ours + l2e mid2", "ours + l2e all", "ours + MEmeL top-k mid2"}
    assert inhibited <= set(result["added_percent"])
    over = result["speed_over_peers"]["ours"]
    assert over == {"transformers": result["ours_over_fastest_peer"]}
    pairs = result["pairs"]
    assert pairs["rounds"] == 3
    assert pairs["added_percent"]["low"] <= pairs["added_percent"]["high"]
    assert "megatron-core" in result["absent"].keys() | result["seconds_a_step"].keys()
