"""Every command of every page is run, or a test that runs it is named; others fail here.

`make test` runs the cheap ones (in a copy of the repository, where what a page names is small) and
lets each verb parse the others; `make test-pages` runs all. What is changed in a command to be run
here stands beside it in COMMANDS, with its reason.
"""

import argparse
import importlib
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import pages
from tests.launch.running import ROOT
from tests.pages import PAGES, blocks, commands, fences, mentioned, name_of, unfenced

LAUNCHERS = ("python", "python3", "deepspeed", "torchrun")


@dataclass(frozen=True)
class Run:
    """Run in the page's order, as it stands but for parts that have others `instead`."""

    instead: dict[str, str] = field(default_factory=dict)
    in_make_test: bool = False


@dataclass(frozen=True)
class By:
    """Run by another test, or by `make test` itself."""

    test: str


QUICK, LONG = Run(in_make_test=True), Run()
# The launcher asks for GPUs, and for a port that another run may have.
TWO_RANKS = {"deepspeed ": "deepspeed --num_gpus 2 --master_port $PORT "}
WHEEL = "python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir whl ."
JOBS = By("tests/launch/planning/test_jobs.py")
ANALYSES = By("tests/l2e/analysis/test_pages.py")

# Of each page its commands, by what they begin with; the longest beginning counts.
COMMANDS: dict[str, dict[str, Run | By]] = {
    "README.md": {
        "make demo": By(".ci/run"),
        "deepspeed launch": Run(TWO_RANKS),
        "deepspeed --hostfile": Run({"deepspeed ": "deepspeed --master_port $PORT "}),
        "sbatch": LONG,
        "kubectl": JOBS,
        "python launch/pretrain.py": LONG,
        "python launch/pretrain.py --help-config": QUICK,
        "pip install .": By("tests/test_packaging.py"),
        "torchrun --nproc-per-node 8": By("tests/launch/test_resume.py"),
    },
    "data/README.md": {
        "python launch/prepare.py": Run(
            {"--step 1000": "--step 3", "--workers 16": "--workers 2"}, in_make_test=True
        ),
    },
    "docs/analysis.md": {
        "python": LONG,
        "python launch/analyze.py VERB": Run({"VERB": "scale"}, in_make_test=True),
    },
    "docs/benchmarks.md": {
        "python bench/run.py": Run({"run.py": "run.py --only layer,loading --rounds 1"}),
        "python bench/gpu.py": By("docs/gpu.md"),
    },
    "docs/configuration.md": {"python launch/pretrain.py --help-config": By("README.md")},
    "docs/experiments.md": {
        "python launch/prepare.py": LONG,
        "python launch/experiment.py": Run({"--workers 12": "--workers 2"}),
        "python bench/travel.py": LONG,
        "python bench/collapse.py": Run({"--steps 150": "--steps 8"}),
        "python -m pytest": By("make test"),
        "python -m tests.distributed.test_l2e_layouts": Run({"layouts": "layouts published 1"}),
    },
    "docs/gpu.md": {
        "python bench/gpu.py": Run({"gpu.py": "gpu.py --smoke"}),  # for CPUs
        "python bench/aot.py": LONG,
        "L2E_TEST_GPU=1 python -m pytest": By("make test"),  # on a CPU
        "bash bench/gather_wheels.sh": Run({"bash": f"{WHEEL}; bash -n"}),  # it needs a network
        "python bench/gpu.py --wheels": Run({"gpu.py": "gpu.py --smoke --only machine"}),
    },
    "docs/how_to/add_a_method.md": {
        "python -m pytest": By("make test"),
        "python launch/pretrain.py": Run({"demo.json": "demo.json --set train.steps=4"}),
        "python launch/compare.py": LONG,
    },
    "docs/how_to/add_an_analysis.md": {"python launch/analyze.py": ANALYSES},
    "docs/how_to/memel_settings.md": {
        "python docs/how_to/memel_": Run({".py": ".py --seeds 1 --steps 12", "300": "12"}),
    },
    "docs/how_to/read_a_report.md": {"python launch/analyze.py": ANALYSES},
    "docs/how_to/run_on_a_cluster.md": {
        "python launch/pretrain.py": LONG,
        "torchrun": Run({"node 8": "node 2"}),
        "deepspeed --num_gpus": Run({"gpus 8": "gpus 2 --master_port $PORT"}),
        "until deepspeed": Run(TWO_RANKS),
        "python launch/plan.py job": JOBS,
        "deepspeed --hostfile FILE": By("README.md"),
        "sbatch job.slurm": By("tests/launch/test_slurm.py"),
    },
    "docs/how_to/train_on_your_own_text.md": {
        "python": Run({"--workers 8": "--workers 2"}),
        "sbatch": LONG,
        "sbatch --array=3,11": By("tests/cases/test_shares.py"),
    },
    "docs/notebook.md": {
        "python launch/export.py": QUICK,
        "pip install": By("tests/test_packaging.py"),
        "python launch/analyze.py fkr": Run({"fkr": "fkr --help"}, in_make_test=True),
    },
    "docs/operations.md": {"python bench/save_kills.py": Run({"200": "3"})},
}
# What a page takes as done.
BEFORE = {
    "docs/notebook.md": "python launch/pretrain.py --config configs/70m.json --run-dir runs/demo "
    "--set parallel.processes=1",
}
# Which test runs a page's Python, all of it.
SNIPPETS = {
    "README.md": "tests/test_readme.py",
    "docs/analysis.md": "tests/l2e/analysis/test_pages.py",
    "docs/notebook.md": "tests/l2e/analysis/test_pages.py",
    "docs/how_to/add_an_analysis.md": "tests/l2e/analysis/test_pages.py",
    "docs/how_to/use_in_your_model.md": "tests/test_use_in_your_model.py",
}


FOUND = [(page, command) for page in PAGES for command in commands(page)]
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_command = pytest.mark.parametrize(
    ("page", "command"), FOUND, ids=[f"{page.stem}: {command[:60]}" for page, command in FOUND]
)


def entry(page: Path, command: str) -> str | None:
    """The longest beginning in COMMANDS of a page's command."""
    known = COMMANDS.get(name_of(page), {})
    return max((words for words in known if command.startswith(words)), key=len, default=None)


def how(page: Path, command: str) -> Run | By | None:
    """How a page's command is run; None if nobody knows it."""
    if (beginning := entry(page, command)) is not None:
        return COMMANDS[name_of(page)][beginning]
    return By("make -n") if command.startswith("make ") else None


@each_command
def test_every_command_is_known(page, command) -> None:
    match how(page, command):
        case None:
            pytest.fail(f"{name_of(page)}: no test knows `{command}`: see COMMANDS")
        case By("make test"):
            paths = [word for word in shlex.split(command) if word.startswith("tests/")]
            assert paths
            assert all((ROOT / path).is_file() for path in paths)
        case By(test) if test in COMMANDS:
            assert isinstance(how(ROOT / test, command), Run)
        case By(test) if test != "make -n":
            assert (ROOT / test).is_file()


def test_nothing_is_known_that_no_page_says() -> None:
    used: dict[tuple[str, str | None], list[str]] = {}
    for page, command in FOUND:
        used.setdefault((name_of(page), entry(page, command)), []).append(command)
    for page, known in COMMANDS.items():
        for beginning, run in known.items():
            said = used.get((page, beginning))
            assert said, f"{page}: {beginning}"
            for part in run.instead if isinstance(run, Run) else ():
                assert any(part in command for command in said), f"{page}: {part}"


@pytest.fixture(scope="session")
def kept(tmp_path_factory) -> Path:
    return pages.check_out(tmp_path_factory.mktemp("pages") / "kept").folder


@pytest.fixture
def checkout(kept, tmp_path) -> pages.Checkout:
    """A checkout of a page's own."""
    shutil.copytree(kept, tmp_path / "l2e", symlinks=True)
    return pages.Checkout(tmp_path / "l2e")


def script(page: Path, quick: bool) -> list[str]:
    """A page's blocks, and the commands of its sentences, as they are run here."""
    scripts = []
    for block in [*blocks(page), *([command] for command in mentioned(page))]:
        lines, runs = [], 0
        for line in block:
            if pages.GRAMMAR.match(line.strip()):
                lines.append(line)
            elif isinstance(run := how(page, line.strip()), Run) and (
                run.in_make_test or not quick
            ):
                for part, other in run.instead.items():
                    line = line.replace(part, other)
                lines.append(line)
                runs += 1
        if runs:
            scripts.append("\n".join(lines))
    return scripts


def run(page: Path, checkout: pages.Checkout, quick: bool) -> None:
    for text in [BEFORE.get(name_of(page), ""), *script(page, quick)]:
        checkout.run(text)


@pytest.mark.parametrize("page", [page for page in PAGES if script(page, True)], ids=name_of)
def test_cheap_commands_run(page, checkout) -> None:
    run(page, checkout, quick=True)


@pytest.mark.pages
@pytest.mark.parametrize(
    "page", [page for page in PAGES if script(page, False) != script(page, True)], ids=name_of
)
def test_all_commands_run(page, checkout) -> None:
    for name, text in pages.files(page):
        (checkout.folder / name).write_text(text.replace("--workers 16", "--workers 1"))
    run(page, checkout, quick=False)


def test_make_has_the_targets_that_pages_name() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    said = [command.split()[1] for _, command in FOUND if command.startswith("make ")]
    assert set(said) <= set(targets)


@each_page
def test_what_a_page_names_exists(page) -> None:
    """Tests, in tables of which test shows what, and files."""
    tests = {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined(path)}
    for words in re.findall(r"`([^`\s]+)`", unfenced(page)):
        path, _, test = words.rpartition("::")
        if test.startswith("test_") and not test.endswith(".py"):
            assert test in (defined(ROOT / path) if path else tests), words
        elif re.fullmatch(r"(tests|launch|bench|model|data|l2e|configs|docs)/[\w/.]+\.\w+", words):
            assert (ROOT / words).exists(), words


def defined(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_commands_stand_in_blocks_that_say_so() -> None:
    """Others would be looked at by nobody."""
    for page in PAGES:
        others = [text for language, text in fences(page) if language not in pages.SHELLS]
        lines = [line for text in others for line in text.splitlines()]
        lines += re.findall(r"^ {4,}(\S.*)", unfenced(page), re.MULTILINE)
        for line in lines:
            assert not line.startswith(tuple(f"{name} " for name in pages.PROGRAMS)), line


@each_page
def test_every_snippet_has_a_test(page) -> None:
    if any(language.startswith("python") for language, _ in fences(page)):
        assert (ROOT / SNIPPETS[name_of(page)]).is_file()
    else:
        assert name_of(page) not in SNIPPETS


class ParsedError(Exception):
    """A verb took its command line."""


@each_command
def test_a_command_is_one_that_its_program_takes(page, command, monkeypatch) -> None:
    """Long ones too, at once; the cheap ones are run."""
    form = how(page, command)
    words = shlex.split(command.split(";")[0])  # of a loop, what it repeats
    scripts = [word for word in words if re.fullmatch(r"(launch|bench|docs/how_to)/\w+\.py", word)]
    if scripts and isinstance(form, Run) and not form.in_make_test and "VERB" not in command:
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
