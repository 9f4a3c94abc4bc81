"""Progress where nobody can watch a bar."""

import io
import re

from l2e.analysis import progress
from l2e.analysis.progress import Progress


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
