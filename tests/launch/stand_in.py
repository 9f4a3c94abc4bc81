"""What stands in for training in the tests of experiments; a worker imports it in no time."""

import json
import os
import time
from pathlib import Path

from launch.engine.signals import STOP

LAYER = {"std": 0.2, "kurtosis": 3.0, "mean_ms": 1.0, "mlp_to_residual": 0.5}
LAYER |= {"selected_fraction": 0.02, "gradient_ratio": 0.25}


def stand_in(arguments: list[str]) -> None:
    """Trains nothing: writes what a run leaves; as its folder's file `behave` says."""
    folder = Path(arguments[arguments.index("--run-dir") + 1])
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    seed, silent = int(settings["train.seed"]), settings["l2e.method"] == '"silence"'
    if (behave := folder / "behave").exists():
        match behave.read_text():
            case "wrong":
                raise ValueError("no such corpus")
            case "crash":
                os._exit(9)
            case "slow":
                STOP.nothing_to_lose = False
                (folder / "began.part").write_text(str(os.getpid()))
                (folder / "began.part").rename(folder / "began")
                while STOP.number is None:
                    time.sleep(0.02)
                (folder / "saved").touch()
                STOP.nothing_to_lose = True
                return
    folder.mkdir(parents=True, exist_ok=True)
    loss = 4 + 0.1 * seed + 0.001 * seed**2 * silent - 0.05 * silent
    rows = [
        {
            "step": step,
            "lm_loss": loss,
            "validation_loss": loss + 0.01 * (60 - step),
            "step_seconds": 0.8 if silent else 1.0,
            "l2e": {"1": LAYER},
        }
        for step in (20, 40, 60)
    ]
    rows[-1]["layer_worth"] = {"together": 0.1}
    rows[-1]["monitor"] = {
        "0": {"mean_ms": 1.0, "ks": 0.5, "fkr": 0.9},
        "1": {"mean_ms": 1.0, "ks": 0.2, "fkr": 0.3 - 0.1 * silent},
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {"git_commit": "c", "versions": {"torch": "2"}, "hardware": "here", "created": "now"}
    manifest["data"] = {"bytes_per_token": 3.0, "training": {"tokens_sha256": "d", "seed": seed}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "finished").touch()
