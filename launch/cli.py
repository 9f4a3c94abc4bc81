"""What the verbs share: their options for a run, numbers within bounds, and how they end.

A user's mistake is a message and exit status 2, a bug is a traceback.
"""

import argparse
import contextlib
import errno
import io
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l2e.hub import is_hub
from l2e.mapped import explain_bus_errors
from l2e.memory import exhausted
from l2e.problems import Problem, first_line

# Characters of a file's name, with room for endings such as .manifest.json.
LONGEST_NAME = 230
MANY_FILES = 2**16  # that a process has open at once


def verb_parser(description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A verb's command line; `--help` prints its description and epilog as they stand."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings
    )


def add_configuration(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options `--config` and `--set`."""
    parser.add_argument(
        "--config",
        type=named,
        metavar="FILE",
        required=required,
        help="the run's configuration, a JSON file",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key, e.g. train.steps=100, or those of a section, e.g. "
        'train={"steps": 100, "seed": 1}; may be repeated',
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """The option `--run-dir`; torchrun takes its old name `--run` for an option of its own."""
    parser.add_argument(
        "--run-dir",
        "--run",
        metavar="DIR",
        type=path,
        help="the run's folder (default: runs/ and the config's name)",
    )


def run_folder(options: argparse.Namespace) -> Path:
    """The folder that `--run-dir` names, or the configuration's own."""
    return options.run_dir or Path("runs") / Path(options.config).stem


def run_verb(main: Callable[[], int | None]) -> None:
    """Run a verb's `main` and leave the process with its exit status.

    A `ValueError`, or a file that can't be read or written, is for the user to mend: the message
    alone is printed, and the status is 2, as argparse's is. A signal that asks to leave does so
    with 128 + its number, as shells expect, after what was half done is tidied up; so does the end
    of a pipe (`--help-config | head`) with 141. Everything else is ours.
    """
    open_standard_files()
    raise_file_limit()
    explain_bus_errors()
    with interruptible() as came:
        status = status_of(main, came)
    sys.exit(status or 0)


def status_of(main: Callable[[], int | None], came: list[signal.Signals]) -> int | None:
    """The exit status of a verb, after what it failed by is told. `came`: of `interruptible`."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush to
        status = 141
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (RuntimeError, MemoryError, OSError) as error:
        told = in_words(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"interrupted by {came[0].name}", file=sys.stderr)
        status = 128 + came[0]
    return status


def open_standard_files() -> None:
    """Standard files that take whatever is written.

    Those that were closed lead to nothing: a file opened next would get their numbers, and in it
    what libraries say.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that a terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")


def raise_file_limit() -> None:
    """As many open files as may be: the first rank of a thousand has a connection to each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def interruptible() -> Iterator[list[signal.Signals]]:
    """Take a batch system's end, and a terminal's, as Ctrl-C is taken, if nobody else takes them.

    Yields a list that begins with the signal that came.
    """
    came = [signal.SIGINT]

    def interrupt(number: int, _: object) -> None:
        came.insert(0, signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise KeyboardInterrupt

    asked = (signal.SIGTERM, signal.SIGHUP)
    mine = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def in_words(error: RuntimeError | MemoryError | OSError) -> str | None:
    """What a user can mend: memory that is exhausted, a file that can't be read or written."""
    place = exhausted(error)
    if place is not None:
        return (
            f"{place} memory is exhausted ({first_line(error)[:300]}); smaller batches or fewer "
            "workers take less, see --help"
        )
    if os.strerror(errno.EMFILE) in str(error):  # also in what libraries make of it
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"{str(error).strip().splitlines()[0]}: this process may have {limit} files and "
            "connections open at once; allow it more (ulimit -n 65536), or start fewer at a time"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; make room for it there, or name another place"
    return None


def named(text: str) -> str:
    """An argparse type: a name, which an unset variable of the shell is not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name a file or a folder")
    if text.startswith("~/"):
        raise argparse.ArgumentTypeError(f"{text}: only a shell replaces ~, at a word's beginning")
    return text


def path(text: str) -> Path:
    """An argparse type: a file or a folder; an empty name would be the folder one is in."""
    return Path(named(text))


def refuse_unwritable(output: Path, is_folder: bool = False) -> None:
    """Raise ValueError where a result will not find its place after hours of work.

    is_folder: whether it is a folder's; else a file's, which may be a device or a pipe.
    """
    around = (output, *output.absolute().parents) if is_folder else output.absolute().parents
    place = next(folder for folder in around if os.path.lexists(folder))
    reason = None
    if output.is_dir() and not is_folder:
        reason = "is a folder"
    elif not place.is_dir():
        reason = f"{place} is no folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f"{place} cannot be written to"
    if reason:
        raise Problem("--output", output, reason, "name another place")


def prefix(text: str) -> str:
    """An argparse type: what the names of files begin with, a name in a folder."""
    name = os.path.basename(named(text))
    if name in ("", ".", "..") or is_hub(text):
        raise argparse.ArgumentTypeError(f"{text} is no name in a folder, as folder/corpus is")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"{name[:20]}... is longer than a file's name can be")
    return text


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        return _within(value, least, most)

    return read


def number(
    least: float, most: float | None = None, *, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: finite numbers from `least`, or above it, to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above and value <= least:
            raise argparse.ArgumentTypeError(f"{text} is out of bounds: more than {least} is meant")
        return _within(value, least, most)

    return read


def _within(value, least, most):
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{value} is out of bounds: {bounds} is meant")
    return value
