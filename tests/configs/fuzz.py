"""Configurations with wrong keys: each ends in a plan or in a report. `make fuzz` tries many.

python -m tests.configs.fuzz --count 5000 --runs 60
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import configs
from bench.random_tokens import write_random_tokens
from configs.schema import Config
from l2e.hub import is_hub
from launch.planning.layouts import layout_of
from launch.planning.summary import summary

SECONDS = 20  # more for one configuration is a hang
TINY = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 256},
    "data": {"sequence_length": 16},
    "schedule": {"warmup_steps": 1},
    "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
    "evaluate": {"batches": 1},
    "deepspeed": {"zero_optimization": {"stage": 1}},
}
WRONG: list[Any] = [
    None, True, False, 0, 1, 2, 3, 7, -1, -5, 100, 2**20, 2**31, 2**32, 2**64, 10**400, 0.0, -0.5,
    0.3, 1.0, 1.5, 1e-300, 1e10, 1e300, float("inf"), float("-inf"), float("nan"), "", "1", "0.5",
    "foo", "auto", "none", "fp16", "adamw", "all", "70m", "a\0b", "\ud800", "x" * 3000, "../..",
    "hf:nobody/nothing", [], [0], [0, 1], [1, 1], [0.5, 0.9], ["x"], [None], [[]], {}, {"stage": 2},
    {"a": 1}, {"a": {"b": []}}, {"": ""}, [2**40], ["foo", 5],
]  # fmt: skip


def whole(folder: Path) -> dict[str, Any]:
    """A tiny configuration with every key written out."""
    prefix = write_random_tokens(folder / "tokens", 2**14, vocab_size=256)
    given = copy.deepcopy(TINY)
    given["data"]["path"] = str(prefix)
    return json.loads(Config.model_validate(given).model_dump_json())


def places(raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, and every section, by its path."""
    for key, value in raw.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def spoil(raw: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """The configuration with 1 to 4 keys wrong, missing, or unknown."""
    raw = copy.deepcopy(raw)
    for path in dice.sample(list(places(raw)), dice.randint(1, 4)):
        place: Any = raw
        for part in path[:-1]:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue  # an earlier one took its section away
        what = dice.random()
        if what < 0.1:
            place.pop(path[-1], None)
        elif what < 0.2:
            place[path[-1] + dice.choice("sx_")] = dice.choice(WRONG)
        else:
            place[path[-1]] = copy.deepcopy(dice.choice(WRONG))
    return raw


class Hang(Exception):
    """A configuration took too long."""


def hang(*_: Any) -> None:
    raise Hang


def verdict(path: Path) -> tuple[str, Config | None]:
    """What becomes of a configuration: plan, report, hang or traceback."""
    signal.alarm(SECONDS)
    try:
        config = configs.load(path)
        summary(config, layout_of(config, config.parallel.processes or 1))
        return "plan", config
    except configs.ConfigError as report:
        return "report" if str(report) else "traceback", None
    except Hang:
        return "hang", None
    except Exception:
        traceback.print_exc(limit=-3)
        return "traceback", None
    finally:
        signal.alarm(0)


def try_configurations(folder: Path, count: int, seed: int) -> tuple[Counter[str], list[Path]]:
    """Verdicts over `count` configurations, and the files of those accepted."""
    before = signal.signal(signal.SIGALRM, hang)
    logging.getLogger("configs").setLevel(logging.ERROR)
    dice, raw = random.Random(seed), whole(folder)
    told: Counter[str] = Counter()
    accepted = []
    try:
        for number in range(count):
            path = folder / f"{number}.json"
            path.write_text(json.dumps(spoil(raw, dice)))
            outcome, config = verdict(path)
            told[outcome] += 1
            if config is not None and not (
                is_hub(config.data.path) or is_hub(config.tokenizer.path)  # which is out of reach
            ):
                accepted.append(path)
            elif outcome == "report":
                path.unlink()
            else:
                print(f"{outcome}: {path}")
    finally:
        logging.getLogger("configs").setLevel(logging.NOTSET)
        signal.signal(signal.SIGALRM, before)
    return told, accepted


def run_one_step(path: Path) -> str | None:
    """Train one step in this process; what went wrong, or None."""
    from launch import pretrain
    from launch.engine.layout import release_layout

    said = io.StringIO()
    words = ["--config", path, "--run-dir", path.with_suffix(""), "--set", "train.stop_after=1"]
    try:
        with contextlib.redirect_stdout(said):
            pretrain.main([str(word) for word in words])
    except (Exception, SystemExit):
        return f"{path}\n{said.getvalue()}{traceback.format_exc()}"
    finally:
        with contextlib.suppress(Exception):
            release_layout()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    told, accepted = try_configurations(folder, options.count, options.seed)
    print(f"{options.count} configurations: {dict(told)}")
    chosen = random.Random(options.seed).sample(accepted, min(options.runs, len(accepted)))
    failed = [message for path in chosen if (message := run_one_step(path)) is not None]
    print("\n".join(failed))
    print(f"{len(chosen)} of the accepted ones trained a step, {len(failed)} failed; in {folder}")
    return 1 if failed or told["traceback"] or told["hang"] else 0


if __name__ == "__main__":
    sys.exit(main())
