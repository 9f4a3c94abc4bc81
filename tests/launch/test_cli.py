"""Numbers on the command line: within their bounds, or a message and status 2 at once."""

import argparse
import io
import re
import resource
import signal
from pathlib import Path

import pytest

from launch import compare, evaluate, export, plan, pretrain
from launch.cli import number, refuse_unwritable, run_verb, whole

VERBS = {
    "compare": (compare.parser(), ["runs"]),
    "evaluate": (evaluate.parser(), ["--checkpoint", "x", "--tasks", "y"]),
    "export": (export.parser(), ["reshard", "--checkpoint", "x", "--output", "y"]),
    "plan": (plan.parser(), ["--config", "x"]),
}
OUT_OF_BOUNDS = [
    *("compare --arms 0", "compare --tolerance -1", "compare --tolerance nan"),
    *("evaluate --shots -1", "evaluate --limit 0", "evaluate --batch-tokens 0"),
    *("export --tensor 0", "export --pipeline -2"),
    *("plan --gpus 0", "plan --efficiency 0", "plan --efficiency 1.5", "plan --efficiency inf"),
]


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_what_is_out_of_bounds_is_named(case, capsys):
    verb, option, value = case.split()
    parser, required = VERBS[verb]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([*required, option, value])
    assert ended.value.code == 2
    assert re.search(rf"argument {option}: {value}\S* is", capsys.readouterr().err)


def test_types_take_their_bounds_and_nothing_else():
    assert [whole(1, 3)(text) for text in ("1", "3")] == [1, 3]
    assert [number(0, 1)(text) for text in ("0", "1", "1e-3")] == [0, 1, 0.001]
    for read, text in ((whole(1, 3), "4"), (whole(0), "1.5"), (number(0, above=True), "0")):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
            read(text)


@pytest.mark.parametrize("where", ["taken", "file/inside", "missing/inside"])
def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys, where):
    """A folder in a result's place, a file in a folder's: the user's, without a traceback."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_verb(lambda: (tmp_path / where).write_text("{}"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / where}: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_verb_that_is_asked_to_leave_tidies_up(capsys, number):
    """What is half done goes, as the verbs see to it by `finally`; the status is a shell's."""
    done = []

    def main() -> None:
        try:
            signal.raise_signal(number)
        finally:
            done.append("tidied up")

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as ended:
        run_verb(main)
    assert ended.value.code == 128 + number
    assert done == ["tidied up"]
    assert f"interrupted by {number.name}" in capsys.readouterr().err
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(
    "failure",
    [
        OSError(24, "Too many open files"),
        RuntimeError("[gloo] rv != -1. pipe: Too many open files\nin loop.cc"),
    ],
)
def test_files_that_a_process_may_have_open(capsys, failure):
    """As many as the administrator allows; a library's failure for want of more is told."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))

    def main() -> None:
        raise failure

    try:
        with pytest.raises(SystemExit) as ended:
            run_verb(main)
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ended.value.code == 2
    assert raised > 100
    told = capsys.readouterr().err
    assert f"Too many open files: this process may have {raised} files" in told


def test_a_place_for_results_is_looked_at_before_hours_of_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for wrong, is_folder, told in (
        (tmp_path, False, "is a folder"),
        (tmp_path / "file" / "x", False, "file is no folder"),
        (tmp_path / "file" / "x", True, "file is no folder"),
        (tmp_path / "file", True, "file is no folder"),
        (tmp_path / "gone", True, "gone is no folder"),
    ):
        with pytest.raises(ValueError, match=told):
            refuse_unwritable(wrong, is_folder)
    for right, is_folder in (
        (tmp_path / "file", False),
        (Path("/dev/stdout"), False),
        (tmp_path / "new" / "x.json", False),
        (tmp_path, True),
        (tmp_path / "new" / "deeper", True),
    ):
        refuse_unwritable(right, is_folder)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        refuse_unwritable(tmp_path / "new", is_folder=True)


@pytest.mark.parametrize(
    "words",
    [
        *("pretrain --run-dir", "pretrain --resume", "pretrain --profile", "pretrain --config"),
        *("evaluate --checkpoint", "export to-hf --checkpoint", "export from-hf --model"),
    ],
)
def test_an_empty_word_names_nothing(capsys, words):
    """As a shell makes of a variable that isn't set: the folder one is in would be meant."""
    verb, *more = words.split()
    parsers = {"pretrain": pretrain, "evaluate": evaluate, "export": export}
    with pytest.raises(SystemExit):
        parsers[verb].parser().parse_args([*more, ""])
    assert "is empty" in capsys.readouterr().err


def test_letters_that_a_terminal_does_not_have(monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", plain)
    with pytest.raises(SystemExit) as ended:
        run_verb(lambda: print("runs/größer"))
    assert ended.value.code == 0
    assert plain.buffer.getvalue() == b"runs/gr\\xf6\\xdfer\n"


def test_a_home_that_no_shell_has_put_in_its_place(capsys):
    """`--output=~/x`, whose ~ is in the middle of a word."""
    with pytest.raises(SystemExit):
        plan.parser().parse_args(["--config", "x", "--output=~/x.json"])
    assert "only a shell replaces ~" in capsys.readouterr().err
