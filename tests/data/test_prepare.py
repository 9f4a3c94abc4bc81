"""Preparation that is cut off, hindered or fed badly: right in the end, or nothing at all."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data import prepare as preparing
from data.corpus import find_sources
from data.index import TokenFile
from data.limits import Limits
from data.partial import PartialCorpus
from data.prepare import Preparation, prepare
from tests.data.conftest import make_texts, write_jsonl
from tests.launch.running import ROOT, succeeds


@pytest.fixture
def what(tmp_path, tokenizer) -> Preparation:
    """Two files of 300 documents and one bad line in all, into tmp_path/out."""
    texts = make_texts(300)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:200], "First")
    with write_jsonl(tmp_path / "in" / "b.jsonl", texts[200:], "Second").open("a") as file:
        file.write('{"no": "text"}\n')
    (tmp_path / "out").mkdir()
    sources = find_sources([str(tmp_path / "in" / "*.jsonl")])
    return Preparation(sources, tokenizer.path, str(tmp_path / "out" / "x"))


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(preparing, "BATCH_DOCUMENTS", 20)
    monkeypatch.setattr(preparing, "COMMIT_TOKENS", 500)


def contents(what: Preparation) -> dict[str, bytes]:
    """Every file beside the output, by the end of its name."""
    files = Path(what.output).parent.iterdir()
    return {path.name.removeprefix("x"): path.read_bytes() for path in files if path.is_file()}


def test_workers_and_batches_change_no_byte(what, tmp_path, monkeypatch):
    prepare(what)
    expected = contents(what)
    assert set(expected) == {".bin", ".idx", ".manifest.json", ".subsets", ".rejects.jsonl"}
    monkeypatch.setattr(preparing, "BATCH_DOCUMENTS", 7)
    for folder, workers in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        other = replace(what, output=str(tmp_path / folder / "x"), workers=workers)
        prepare(other)
        assert contents(other) == expected


@pytest.mark.parametrize("after", [1, 4, 9])
@pytest.mark.parametrize("cut", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_preparation_goes_on(
    what, tmp_path, monkeypatch, small_batches, after, cut, capsys
):
    """Cut off inside a batch, some of it written: it is added anew, and every byte is the same."""
    whole = replace(what, output=str(tmp_path / "whole" / "x"))
    prepare(whole)
    add, calls = PartialCorpus.add, []

    def add_some(self, *arguments):
        calls.append(arguments)
        add(self, *arguments)
        if len(calls) > after:
            raise cut

    monkeypatch.setattr(PartialCorpus, "add", add_some)
    with pytest.raises(cut):
        prepare(what)
    assert contents(what) == {}
    calls.clear()
    monkeypatch.setattr(PartialCorpus, "add", lambda self, *a: (calls.append(a), add(self, *a)))
    prepare(what)
    assert contents(what) == contents(whole)
    assert len(calls) == 16 - after  # 301 units in batches of 20
    assert "continuing after" in capsys.readouterr().out


KILLED = """
import sys
from pathlib import Path
from data import prepare as preparing
from data.corpus import find_sources
from data.limits import Limits
preparing.BATCH_DOCUMENTS, preparing.COMMIT_TOKENS = 5, 100
what = preparing.Preparation(
    find_sources([sys.argv[1]]), Path(sys.argv[2]), sys.argv[3], workers=2, limits=Limits(0.5)
)
preparing.prepare(what)
"""


def _command(what: Preparation) -> list[str]:
    inputs = str(Path(what.sources[0].name).parent / "*.jsonl")
    return ["-c", KILLED, inputs, str(what.tokenizer), what.output]


def test_a_killed_process_leaves_what_can_be_gone_on_from(what, tmp_path):
    """SIGKILL at some moment, workers and all; the same command then gives the same bytes."""
    whole = replace(what, output=str(tmp_path / "whole" / "x"))
    prepare(whole)
    process = subprocess.Popen([sys.executable, *_command(what)], cwd=ROOT, start_new_session=True)
    state = Path(f"{what.output}.partial/state.json")
    while not state.exists() and process.poll() is None:
        os.sched_yield()
    process.kill()
    process.wait()
    assert state.exists()
    assert contents(what) == {}
    succeeds(*_command(what))
    assert contents(what) == contents(whole)
    deadline = time.monotonic() + 20
    while _living(process.pid) and time.monotonic() < deadline:
        os.sched_yield()
    assert not _living(process.pid)  # its workers end with it


def _living(group: int) -> list[str]:
    """Processes of the group that run, as Linux lists them; those that only wait to be reaped
    don't count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(process_group) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize("moved", range(5))
def test_a_crash_between_renames_is_mended(what, tmp_path, monkeypatch, moved):
    whole = replace(what, output=str(tmp_path / "whole" / "x"))
    prepare(whole)
    replace_file, left = Path.replace, [moved]

    def replace_some(self, target):
        if str(target).startswith(what.output) and "partial" not in str(target):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            prepare(what)
    assert ".manifest.json" not in contents(what)
    prepare(what)
    assert contents(what) == contents(whole)


def test_preparing_again_does_nothing(what, monkeypatch, capsys):
    first = prepare(what)
    monkeypatch.setattr(preparing, "tokenize", None)
    assert prepare(what) == first
    assert "already prepared" in capsys.readouterr().out


def test_what_was_prepared_before_ends_were_part_of_a_job_is_known(what, monkeypatch, capsys):
    """Manifests of the first versions have the end of text beside the job, and count less."""
    written = prepare(what)
    for key in ("wording", "passed_over", "end_of_text_token"):
        del written[key]
    del written["job"]["end_of_text"]
    Path(f"{what.output}.manifest.json").write_text(json.dumps(written))
    monkeypatch.setattr(preparing, "tokenize", None)
    assert prepare(what) == written
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize("remains", [False, True])
def test_another_jobs_output_is_not_touched(what, tmp_path, remains):
    """Nor where an empty folder of a process that died early lies beside it."""
    prepare(what)
    before = contents(what)
    if remains:
        Path(f"{what.output}.partial").mkdir()
    write_jsonl(tmp_path / "in" / "c.jsonl", ["more"])
    more = replace(what, sources=find_sources([str(tmp_path / "in" / "*.jsonl")]))
    with pytest.raises(ValueError, match="token files of other sources"):
        prepare(more)
    assert contents(what) == before


def test_another_jobs_remains_are_not_mixed_in(what, tmp_path, monkeypatch, small_batches):
    monkeypatch.setattr(PartialCorpus, "remove", lambda self: None)
    monkeypatch.setattr(preparing, "move_into_place", lambda *_: None)
    prepare(what)
    write_jsonl(tmp_path / "in" / "c.jsonl", ["more"])
    more = replace(what, sources=find_sources([str(tmp_path / "in" / "*.jsonl")]))
    with pytest.raises(ValueError, match="an interrupted preparation that differs in sources"):
        prepare(more)


def test_two_at_once_are_refused(what):
    job = {"some": "job"}
    with (
        PartialCorpus(Path(f"{what.output}.partial"), job),
        pytest.raises(ValueError, match="another process is preparing it"),
    ):
        prepare(what)


def test_rejects_are_listed_and_counted(what):
    manifest = prepare(what)
    assert manifest["documents"] == 300
    assert manifest["rejects"] == {"total": 1, "reasons": {"field 'text'": 1}}
    [line] = Path(f"{what.output}.rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "reason": "field 'text': expected text, found nothing in a record of no; --text-field "
        "names another",
        "source": what.sources[1].name,
        "line": 101,
        "content": '{"no": "text"}',
    }


def test_too_many_rejects_stop_it(what):
    with pytest.raises(ValueError, match=r"1 of 301 records .* above --max-rejects 0.001"):
        prepare(replace(what, limits=Limits(rejects=0.001)))
    assert set(contents(what)) == {".rejects.jsonl"}
    assert not Path(f"{what.output}.partial").exists()


def test_too_many_rejects_stop_it_early(what, tmp_path, monkeypatch):
    """After the first thousand records, not after the last million."""
    bad = tmp_path / "in" / "bad.jsonl"
    bad.write_text("nonsense\n" * 5000)
    with pytest.raises(ValueError, match=r"(\d+) of \1 records can't be used") as error:
        prepare(replace(what, sources=find_sources([str(bad)])))
    assert int(str(error.value).split()[0]) < 2500


def test_no_documents_at_all_is_an_error(what, tmp_path):
    (tmp_path / "in" / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no documents"):
        prepare(replace(what, sources=find_sources([str(tmp_path / "in" / "bad.jsonl")])))
    assert contents(what) == {}


def test_a_damaged_source_leaves_nothing(what, tmp_path):
    (tmp_path / "in" / "z.jsonl.gz").write_bytes(b"\x1f\x8b nonsense")
    damaged = replace(what, sources=find_sources([str(tmp_path / "in" / "*")]))
    with pytest.raises(ValueError, match="damaged or unreadable"):
        prepare(damaged)
    assert not list(Path(what.output).parent.glob("*.partial"))
    assert ".bin" not in contents(what)


def test_a_full_disk_leaves_nothing(what):
    """A limit on file sizes stands for the disk: writing past it fails in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match=r"writing failed .* nothing is left behind"):
            prepare(what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(Path(what.output).parent.iterdir())


def test_a_full_disk_later_on_keeps_what_is_done(what, tmp_path, monkeypatch, small_batches):
    whole = replace(what, output=str(tmp_path / "whole" / "x"))
    prepare(whole)

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_index", no_space)
        with pytest.raises(ValueError, match=r"No space left .* run the same command to go on"):
            prepare(what)
    assert contents(what) == {}
    prepare(what)
    assert contents(what) == contents(whole)


def test_an_output_that_cannot_be_written_is_named(what, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output .* can't be written .* choose another"):
        prepare(replace(what, output=str(tmp_path / "file" / "x")))


def test_nothing_but_whole_ids_are_stored(what, tokenizer):
    prepare(what)
    tokens = TokenFile(what.output).tokens
    assert int(tokens.max()) < tokenizer.vocab_size
