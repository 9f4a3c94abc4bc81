"""What the pages tell a reader to type, and a checkout in which it can be typed.

The checkout is a copy of this one, in which what the pages name exists and is small: corpora,
tokenizers, models, passages, and the configurations of large models under their own names. So a
page's commands run as they stand there, or with the few changes that tests/test_pages.py lists.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tests.launch.running import ENVIRONMENT, ROOT, free_port

PAGES = sorted([*ROOT.glob("*.md"), ROOT / "data" / "README.md", *(ROOT / "docs").rglob("*.md")])
SHELLS = ("bash", "sh", "shell", "console")
PROGRAMS = (
    "python", "python3", "pytest", "deepspeed", "torchrun", "make", "pip", "bash", "sbatch", "srun",
    "kubectl", "mpirun", "docker", "tensorboard",
)  # fmt: skip
# Lines of a block that are the shell's own.
GRAMMAR = re.compile(
    r"#|(for|done|until|while|if|fi|cd|export|source)\b(?!.*\b(python|deepspeed)\b)"
)
NOT_COPIED = (".git", ".venv", "runs", "build", ".pytest_cache", ".mypy_cache", ".hypothesis")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[tuple[str, str]]:
    """A page's fenced blocks: the language with what else stands there, and the text."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def unfenced(page: Path) -> str:
    """A page's sentences, tables and lists."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def is_file(block: str) -> bool:
    """Whether a block is a program to be kept, under the name in its second line."""
    return block.startswith("#!")


def files(page: Path) -> list[tuple[str, str]]:
    """The programs that a page has its reader keep: their names and texts."""
    texts = [text for _, text in fences(page) if is_file(text)]
    return [(text.splitlines()[1].removeprefix("# "), text) for text in texts]


def blocks(page: Path) -> list[list[str]]:
    """The lines of each block that is to be typed: continuation lines joined, without comments."""
    typed = [text for language, text in fences(page) if language in SHELLS and not is_file(text)]
    lines = [text.replace("\\\n", " ").splitlines() for text in typed]
    return [[shorten(line) for line in some if line.strip()] for some in lines]


def shorten(line: str) -> str:
    """A line without its comment and with single blanks."""
    return re.sub(r"(?<=\S) {2,}", " ", re.sub(r"\s+#.*", "", line)).rstrip()


def mentioned(page: Path) -> list[str]:
    """Commands in a page's sentences."""
    quoted = re.findall(r"`([^`]+)`", unfenced(page))
    words = [" ".join(text.split()) for text in quoted]
    return [text for text in words if text.split()[0] in PROGRAMS and " " in text]


def commands(page: Path) -> list[str]:
    """All that a page says to type, in blocks and in sentences."""
    lines = [line.strip() for block in blocks(page) for line in block]
    return [line for line in lines if not GRAMMAR.match(line)] + mentioned(page)


@dataclass(frozen=True)
class Checkout:
    """A copy of the repository with its environment, and what the pages' commands ask for."""

    folder: Path

    def run(self, script: str, timeout: int = 1800) -> str:
        """What bash prints that runs these lines one after another, up to the first failure."""
        stand_ins, programs = self.folder / "stand_ins", self.folder / ".venv" / "bin"
        path = f"{programs}:{stand_ins}:{os.environ['PATH']}"
        port = str(free_port())
        environment = ENVIRONMENT | {"PATH": path, "PORT": port, "PET_MASTER_PORT": port}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment | {"HF_HUB_OFFLINE": "1", "MAKEFLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, (
            f"{script}\nended with {done.returncode}:\n{done.stdout[-6000:]}"
        )
        return done.stdout


def check_out(folder: Path) -> Checkout:
    """Such a copy; `make` finds the environment of this process, and finds it fresh."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "installed":
            (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv" / "installed").touch()
    write_stand_ins(folder / "stand_ins")
    write_configs(folder / "configs", folder.parent / "prepared_once")
    write_texts(folder)
    write_models(folder)
    return Checkout(folder)


def write_stand_ins(folder: Path) -> None:
    """A cluster's programs: sbatch runs a script here, pdsh says what it was given."""
    programs = {
        "sbatch": """
            range=$(grep -oP '(?<=--array=)[0-9]+-[0-9]+' <<<"$*" || echo 0-0)
            for task in $(seq "${range%-*}" "${range#*-}"); do
                SLURM_SUBMIT_DIR=$PWD SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=1 bash "${@: -1}"
            done""",
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
        "ssh": "echo 127.0.0.1",  # what a host says of its address
        "pdsh": 'echo "pdsh $*"',
    }
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash -e\n{text}\n")
        (folder / name).chmod(0o755)


def write_configs(folder: Path, cache: Path) -> None:
    """The shipped configurations of a few steps of a tiny model; plans of two seeds of them.

    They share the built-in corpus, which the first of them prepares in `cache`.
    """
    shape = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 2048}
    shape["max_position_embeddings"] = 512
    small = {
        "model": {"num_layers": 4, **shape},
        "l2e": {"late_start_step": 2, "forget_step": 2},
        "data": {
            "path": "builtin",
            "order": "neox",
            "sequence_length": 64,
            "cache_dir": str(cache),
        },
        "tokenizer": {"vocab_size": 2048},
        "schedule": {"type": "neox", "warmup_steps": 2},
        "parallel": {"processes": 2},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "dtype": "fp32"},
        "checkpoint": {"interval": 4},
        "evaluate": {"interval": 4, "batches": 1},
        "logging": {"interval": 1},
    }
    for path in folder.glob("*.json"):
        settings = json.loads(path.read_text())
        if "preset" in settings["model"]:
            train = settings["train"] | small["train"]
            path.write_text(json.dumps(small | {"train": train}))
    demo = folder / "demo.json"
    for path in (demo, folder / "3m.json", folder / "experiments" / "study_base.json"):
        settings = json.loads(path.read_text())
        settings["model"] |= {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 2}
        if path == demo:
            settings["data"]["cache_dir"] = str(cache)
            settings["model"]["vocab_size"] = settings["tokenizer"]["vocab_size"] = 2048
        for name in ("l2e", "schedule", "train", "evaluate", "logging"):
            settings[name] |= small[name] | {"type": "neox"} if name == "schedule" else small[name]
        settings["data"]["sequence_length"] = 64
        if settings["checkpoint"]["interval"]:
            settings["checkpoint"] = {"interval": 4, "steps": [0, 1, 2, 4, 8]}
        path.write_text(json.dumps(settings))
    for path in (folder / "experiments").glob("*.json"):
        plan = json.loads(path.read_text())
        if plan.get("base") == "study_base.json":
            plan["seeds"] = plan["seeds"][:2]
            for arm in plan["arms"]:
                arm["seeds"] = 1 if "seeds" in arm else 2
        elif plan.get("base") == "../demo.json":
            intervals = dict.fromkeys(("checkpoint.interval", "evaluate.interval"), 4)
            plan["overrides"] |= {"train.steps": 8, "l2e.late_start_step": 2, **intervals}
        path.write_text(json.dumps(plan))


def write_texts(folder: Path) -> None:
    """Corpora, tokenizers, passages and tasks under every name that a page has for them."""
    import random

    import zstandard

    from data import builtin
    from tests.cases.test_tokenizers import byte_level

    byte_level(folder / "20B_tokenizer.json", "<|endoftext|>")
    for name in ("CORPUS", "FEATURES", "corpus", "pile", "texts"):
        (folder / name).mkdir()
    for part, source in (("valid", builtin.VALIDATION), ("train", builtin.TRAIN)):
        documents = islice(builtin.documents(source), 200)
        some = [row | {"text": row["text"][:4000]} for row in documents]
        lines = "\n".join(json.dumps(row) for row in some).encode()
        (folder / "CORPUS" / f"{part}.jsonl.zst").write_bytes(zstandard.compress(lines))
    for name in ("corpus/train.jsonl.zst", "pile/00.jsonl.zst"):
        shutil.copy(folder / "CORPUS" / "train.jsonl.zst", folder / name)
    (folder / "texts" / "a.jsonl").write_bytes(lines)  # plain, so that it can be shared out
    rng = random.Random(0)
    words = {"count": "one two three four five", "colour": "red green blue white black"}
    rows = [
        {"text": " ".join(rng.choices(words[name].split(), k=150)), "feature": name}
        for _ in range(70)
        for name in words
    ]
    for name in ("natural_language", "data_subset", "languages", "FEATURES/data_subset"):
        write_lines(folder / f"{name}.jsonl.gz", rows)
    labelled = [{"sentence": row["text"], "label": int(row["feature"] == "count")} for row in rows]
    for name in ("cola", "mrpc"):
        write_lines(folder / f"{name}.jsonl.gz", labelled)


def write_lines(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) for row in rows]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def write_models(folder: Path) -> None:
    """What stands for models and checkpoints of the hub: four layers of 32, and a token a byte."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from tests import tiny_models

    torch.manual_seed(0)
    end = tiny_models.END_OF_TEXT
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_models.byte_tokenizer(), eos_token=end, pad_token=end
    )
    bert = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=12, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    models = {"bert-base-uncased": BertForSequenceClassification(bert)}
    for name in ("EleutherAI/pythia-70m", "checkpoints/step0", "checkpoints/step512"):
        models[name] = tiny_models.gpt_neox(4, 32, vocab_size=257, max_position_embeddings=512)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
