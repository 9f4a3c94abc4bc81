"""docs/how_to/train_on_your_own_text.md: its commands, as they stand, on a small corpus."""

import re
import shlex
from pathlib import Path

import pytest

from data import manifest
from launch import prepare as verb
from tests.cases.test_shares import contents
from tests.cases.test_tokenizers import byte_level
from tests.data.conftest import make_texts, write_jsonl
from tests.launch.running import ROOT, succeeds

PAGE = (ROOT / "docs" / "how_to" / "train_on_your_own_text.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
SHARES = 16


def arguments(containing: str) -> list[str]:
    """The words after the script's name of the page's only such command, with one worker."""
    [command] = [line for line in COMMANDS if containing in line]
    words = shlex.split(re.sub(r"--workers \d+", "--workers 1", command))
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]


def test_the_pages_commands(tmp_path, monkeypatch, capsys) -> None:
    def prepare(*words: str) -> None:
        verb.main([*words])

    monkeypatch.chdir(tmp_path)
    byte_level(tmp_path / "20B_tokenizer.json", "<|endoftext|>")
    Path("texts").mkdir()
    long = [" ".join(make_texts(80, seed)) for seed in range(60)]
    write_jsonl(Path("texts/a.jsonl"), long[:35])
    write_jsonl(Path("texts/b.jsonl"), long[35:])
    prepare(*arguments("--input texts --tokenizer 20B_tokenizer.json --output"))
    prepare(*arguments(" stats "))
    assert "60 documents" in capsys.readouterr().out
    whole = contents("prepared/texts")
    for path in Path("prepared").iterdir():
        path.unlink()
    share = arguments("--shard")
    for number in range(1, SHARES + 1):
        prepare(*(word.replace("$SLURM_ARRAY_TASK_ID", str(number)) for word in share))
    name, *rest = arguments(" join ")
    shares = f"prepared/share-{{1..{SHARES}}}"
    assert rest[0] == shares, "the shell writes these out"
    prepare(name, *(f"prepared/share-{k}" for k in range(1, SHARES + 1)), *rest[1:])
    assert contents("prepared/texts") == whole
    assert manifest.path("prepared/texts").exists()
    train = [str(ROOT / word) if word.startswith("configs/") else word
             for word in arguments("launch/pretrain.py")]  # fmt: skip
    train += ["--set", f"data.path={tmp_path}/prepared/texts", "--dry-run"]
    succeeds("launch/pretrain.py", *train)


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z-]+)", PAGE))))
def test_options_that_the_page_names_exist(option) -> None:
    assert option in verb.parser().format_help()
