"""Progress where nobody can watch a bar."""

import io
import re

from l2e import progress
from l2e.progress import Progress, say


def test_long_work_leaves_plain_lines_in_a_file(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    file = io.StringIO()
    assert list(Progress(range(3), desc="probing", unit="layers", file=file)) == [0, 1, 2]
    text = file.getvalue()
    assert "\r" not in text
    assert text.endswith("\n")
    lines = text.splitlines()
    assert all(re.fullmatch(r"probing: \d of 3 layers \[.*left.*\]", line) for line in lines), lines
    assert lines[-1].startswith("probing: 3 of 3")


def test_short_work_leaves_none():
    file = io.StringIO()
    assert len(list(Progress(range(3), desc="probing", unit="layers", file=file))) == 3
    assert file.getvalue() == ""


def test_it_can_be_silenced(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    file = io.StringIO()
    list(Progress(range(3), desc="probing", unit="layers", progress=False, file=file))
    assert file.getvalue() == ""


def test_numbers_stand_beside_the_rate(monkeypatch):
    file = io.StringIO()
    bar = Progress(total=3, desc="training", unit="steps", delay=0, file=file)
    bar.set_postfix({"loss": "2.5"}, refresh=False)
    bar.advance_to(3)
    bar.close()
    assert file.getvalue().splitlines()[-1].endswith("loss=2.5]")


def test_a_line_does_not_break_a_bar(monkeypatch):
    """The bar is wiped, the line is whole, and the bar is drawn anew below it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    bar = Progress(total=3, desc="training", unit="steps")
    say("checkpoint written")
    bar.close()
    assert re.search(r"training.*\r *\rcheckpoint written\n\r?training", terminal.getvalue())
