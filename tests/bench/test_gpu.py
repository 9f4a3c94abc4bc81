"""bench/gpu.py end to end on tiny shapes, and what it leaves when a part goes wrong."""

import json
import sys

import pytest

pytest.importorskip("triton")
from bench import gpu
from bench.gpu_parts import parts
from tests.launch.running import succeeds


def test_smoke(tmp_path):
    output, only = tmp_path / "found.json", "machine,loss,step,measuring"
    succeeds("bench/gpu.py", "--smoke", "--output", output, "--only", only)
    parts = json.loads(output.read_text())["parts"]
    assert list(parts) == ["loss", "machine", "measuring", "step"]
    assert all(part["failed"] == [] for part in parts.values()), parts
    assert parts["step"]["measured_seconds"] > 0


@pytest.mark.parametrize(
    ("limits", "why", "after_it"),
    [
        ({"PARTS": gpu.PARTS | {"layer": 0.5}}, "stopped after its 0.5 s", True),
        ({"LEAST_SECONDS": 0}, "stopped by the end of the bench's", False),
    ],
    ids=["its own limit", "the whole's"],
)
def test_a_part_that_hangs_leaves_the_others(tmp_path, monkeypatch, limits, why, after_it):
    """The worker is a script that writes one part's numbers and never ends the second."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--worker') + 1])\n"
        "names = sys.argv[sys.argv.index('--only') + 1].split(',')\n"
        "for name in names:\n"
        "    (folder / 'running').write_text(name)\n"
        "    (folder / f'{name}.json').write_text('{\"failed\": [], \"kept\": 1}')\n"
        "    time.sleep(1000 if name == 'layer' else 0)\n"
        "(folder / 'running').write_text('')\n"
    )
    output = tmp_path / "found.json"
    monkeypatch.setattr(gpu, "__file__", str(worker))
    for name, value in limits.items():
        monkeypatch.setattr(gpu, name, value)
    seconds = "530" if after_it else "2"
    only = ["--only", "machine,layer,loss", "--output", str(output), "--seconds", seconds]
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", *only])
    gpu.main()
    parts = json.loads(output.read_text())["parts"]
    assert parts["machine"] == {"failed": [], "kept": 1}
    assert parts.get("loss") == ({"failed": [], "kept": 1} if after_it else None)
    assert parts["layer"]["kept"] == 1
    assert parts["layer"]["failed"][0].startswith(why)


def test_every_part_is_one_that_can_be_run():
    assert {name.partition("_")[0] for name in gpu.PARTS} == set(parts.PARTS)
    assert set(gpu.SMOKE_PARTS) <= set(gpu.PARTS)
