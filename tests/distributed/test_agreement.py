"""Ranks that were started otherwise, or whose hosts have other files, do not train together."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist

from launch.training import agreement
from launch.training.agreement import find_together, refuse_disagreement, refuse_other_runs
from tests.distributed.checkpointing import make_config
from tests.distributed.processes import run_on_processes
from tests.distributed.test_checkpoint_refusals import message
from tests.launch.checkpoint.test_folders import save


def disagreements(folder: str) -> dict[str, str]:
    """What two ranks are told; the second has settings, or files, of its own."""
    rank, agreement.SEEN_BY_ALL = dist.get_rank(), 1
    own, run = Path(folder) / str(rank), Path("run")
    one, other = make_config(), make_config(train={"seed": 7})
    found = {
        "alike": message(lambda: refuse_other_runs(one, run, "auto")),
        "seed": message(lambda: refuse_other_runs(other if rank else one, run, "auto")),
        "folder": message(lambda: refuse_other_runs(one, Path(f"run{rank}"), "auto")),
        "resume": message(lambda: refuse_other_runs(one, run, "auto" if rank else "none")),
    }
    if rank:
        agreement.versions = lambda: {"torch": "2.0.0"}
    found["versions"] = message(lambda: refuse_other_runs(one, run, "auto"))
    # Each host has a disk of its own, and a run in a folder of the same name.
    found["copies"] = find_together(own, "auto").name
    shutil.rmtree(own / "checkpoints" / "step_0000002") if rank else None
    found["missing"] = message(lambda: find_together(own, "auto"))
    found["named"] = message(lambda: find_together(own, str(own / "checkpoints/step_0000001")))
    if rank:
        path = own / "checkpoints" / "step_0000001" / "files.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    found["changed"] = message(lambda: find_together(own, str(own / "checkpoints/step_0000001")))
    found["none"] = str(find_together(own, "none"))
    looks = iter(range(3))  # a disk that shows the newest folder after a while
    late = {"alike": lambda: {"seen": rank == 0 or next(looks) == 2}}
    found["late"] = message(lambda: refuse_disagreement(late["alike"], "", seconds=3))
    return found


def test_ranks_that_are_not_of_one_run_are_refused(tmp_path):
    for rank in range(2):
        for step in (1, 2):
            save(tmp_path / str(rank) / "checkpoints", step)
    for told in run_on_processes(disagreements, 2, tmp_path, str(tmp_path)):
        assert "train.seed is 7 on rank 1" in told["seed"]
        assert "and 1234 on rank 0" in told["seed"]
        assert "--run-dir is 'run1' on rank 1" in told["folder"]
        assert "--resume is 'auto' on rank 1" in told["resume"]
        assert "versions.torch is '2.0.0' on rank 1" in told["versions"]
        assert "step_0000002 is None on rank 1" in told["missing"]
        assert "a disk that all of them share" in told["missing"]
        assert "step_0000001 is '" in told["changed"]
        assert told["copies"] == "step_0000002"
        assert told["none"] == "None"
        assert {told[name] for name in ("alike", "named", "late")} == {"no error"}
