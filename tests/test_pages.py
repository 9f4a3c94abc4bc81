"""Every command of every page is one that its verb takes; what the pages name exists.

The README's own commands are run by test_readme.py, and each how-to's by the test of its subject.
CONTRIBUTING.md says which are not run.
"""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from launch import plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# Programs of the system's or of a cluster's, which the tests do not have.
OTHERS = (
    "make", "sbatch", "kubectl", "pip", "docker", "tensorboard", "git", "bash", "scontrol",
    "squeue", "apt-get", "source", "cd", "export", "for", "done", "mpirun", "srun", "ssh", "#",
)  # fmt: skip
# What stands before a script that a launcher starts.
LAUNCHERS = ("python", "python3", "deepspeed", "torchrun")


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, continuation lines joined, comments left out.

    Those marked as `shell` need what the page makes first, and are run by its own test.
    """
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


FOUND = [(page, command) for page in PAGES for command in commands(page)]


def mentions(page: Path) -> list[str]:
    """Commands in a page's sentences, which may leave out what they need."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"`((?:python|make)\s[^`]+)`", text)
    return [" ".join(words.split()) for words in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_sentence_names_exists(page) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in mentions(page):
        program, name, *more = command.split()
        if program == "make":
            assert name in targets, command
        elif name == "-m":
            assert (ROOT / more[0].replace(".", "/")).with_suffix(".py").exists(), command
        else:
            assert (ROOT / name).exists(), command


def test_commands_stand_in_blocks_that_say_so() -> None:
    """A block without a language would be looked at by nobody."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for line in "".join(block for language, block in blocks if not language).splitlines():
            assert not line.startswith(LAUNCHERS), f"{page.name}: {line}"


def test_the_cluster_pages_jobs_are_written(tmp_path, monkeypatch) -> None:
    page = ROOT / "docs" / "how_to" / "run_on_a_cluster.md"
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    written = []
    for command in commands(page):
        words = shlex.split(command)
        if words[1:3] == ["launch/plan.py", "job"]:
            plan.main(words[2:])
            written.append(Path(words[words.index("--output") + 1]))
            assert written[-1].stat().st_size > 0
            written[-1].unlink()
    assert len(written) >= 4


class ParsedError(Exception):
    """A verb took its command line."""


@pytest.mark.parametrize(
    ("page", "command"), FOUND, ids=[f"{page.stem}: {command[:60]}" for page, command in FOUND]
)
def test_a_command_is_one_that_its_program_takes(page, command, monkeypatch) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
        words = words[1:]
    if not words or words[0] in OTHERS:
        return
    assert words[0] in LAUNCHERS, f"{page.name}: {command}"
    if words[1:3] == ["-m", "pytest"]:
        paths = [word for word in words[3:] if not word.startswith("-")]
        assert all((ROOT / path.split("::")[0]).exists() for path in paths), command
        return
    scripts = [
        word for word in words if re.fullmatch(r"(launch|bench|docs|docs/how_to)/\w+\.py", word)
    ]
    assert scripts, f"{page.name}: {command}: names no verb"
    assert (ROOT / scripts[0]).exists(), command
    takes(scripts[0], words[words.index(scripts[0]) + 1 :], monkeypatch)


def takes(script: str, arguments: list[str], monkeypatch) -> None:
    """Let the verb parse its command line, and nothing more."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *given, **named):
        parse(self, *given, **named)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])  # a verb puts the root in place of the first
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(ParsedError):
        module.main()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
