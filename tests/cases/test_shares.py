"""Shares prepared apart and joined: to the byte what one preparation of everything writes."""

import gzip
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from data.corpus import Source, look_over
from data.join import join
from data.limits import Limits
from data.prepare import Preparation
from data.prepare import prepare as prepare_corpus
from data.shares import Share, divide
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(1200)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer) -> Preparation:
    """Sources of every kind, with rejects and blank lines, prepared at once to `whole/out`."""
    folder = tmp_path_factory.mktemp("shares")
    inside = folder / "in"
    inside.mkdir()
    rows = [json.dumps({"text": text, "meta": {"pile_set_name": "ABC"[i % 3]}}) + "\n"
            for i, text in enumerate(TEXTS[:800])]  # fmt: skip
    for number in (0, 300, 301, 799):
        rows[number] += "nonsense\n\n"
    (inside / "a.jsonl").write_text("\ufeff" + "".join(rows) + "\n")
    (inside / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[400:600]).encode()))
    column = arrow.array([*TEXTS[800:], None, "  "])
    parquet.write_table(arrow.table({"text": column}), inside / "c.parquet", row_group_size=30)
    (inside / "d.txt").write_text("one document </s>, two\n\nparagraphs")
    (inside / "README.md").write_text("about it")
    write_jsonl(inside / "e.jsonl", ["x" * 5000, "y"], "D")
    found = look_over([str(inside)])
    what = Preparation(
        found.sources, tokenizer.path, str(folder / "out"), passed_over=found.passed_over
    )
    prepare_corpus(what)
    return what


def contents(prefix: Path | str) -> dict[str, bytes]:
    prefix = Path(prefix)
    files = prefix.parent.glob(f"{prefix.name}.*")
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in files}


def prepare_share(what: Preparation, text: str, output: Path) -> str:
    share = Share.parse(text, what.sources)
    prepare_corpus(replace(what, sources=share.own(), share=share, output=str(output)))
    return str(output)


@pytest.mark.parametrize("of", [1, 3, 7, 40])
def test_joined_shares_are_what_one_run_writes(whole, tmp_path, of) -> None:
    prefixes = [prepare_share(whole, f"{k}/{of}", tmp_path / f"s{k}") for k in range(1, of + 1)]
    random.Random(of).shuffle(prefixes)
    join(prefixes, str(tmp_path / "joined"), Limits())
    expected = contents(whole.output)
    assert set(expected) == {".bin", ".idx", ".manifest.json", ".subsets", ".rejects.jsonl"}
    assert contents(tmp_path / "joined") == expected


def test_a_cut_between_two_lines_loses_neither(tmp_path, tokenizer) -> None:
    """Four lines of one length: the second half begins with the first byte of the third."""
    path = write_jsonl(tmp_path / "x.jsonl", ["one", "two", "six", "ten"])
    what = Preparation(look_over([str(path)]).sources, tokenizer.path, str(tmp_path / "whole"))
    prepare_corpus(what)
    prefixes = [prepare_share(what, f"{k}/2", tmp_path / f"s{k}") for k in (1, 2)]
    join(prefixes, str(tmp_path / "joined"), Limits())
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


def test_every_byte_is_in_one_share_and_they_are_alike() -> None:
    plain = [Source(f"{i}.jsonl", "jsonl", span=(0, 1000 + i)) for i in range(5)]
    for of in (1, 2, 3, 16, 999):
        shares = divide([replace(source, span=(0, source.size)) for source in plain], of)
        spans = [(s.name, s.span) for share in shares for s in share]
        covered = {source.name: 0 for source in plain}
        for name, (start, stop) in spans:
            assert start == covered[name] < stop
            covered[name] = stop
        assert list(covered.values()) == [source.size for source in plain]
        sizes = [sum(s.size for s in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_killed_share_is_redone_alone(whole, tmp_path, monkeypatch) -> None:
    from data import prepare as preparing
    from data.partial import PartialCorpus

    monkeypatch.setattr(preparing, "BATCH_DOCUMENTS", 20)
    monkeypatch.setattr(preparing, "COMMIT_TOKENS", 500)
    add, left = PartialCorpus.add, [5]

    def add_some(self, *arguments):
        add(self, *arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    first = prepare_share(whole, "1/2", tmp_path / "s1")
    before = contents(first)
    monkeypatch.setattr(PartialCorpus, "add", add_some)
    with pytest.raises(KeyboardInterrupt):
        prepare_share(whole, "2/2", tmp_path / "s2")
    with pytest.raises(ValueError, match="s2: is no finished share"):
        join([first, str(tmp_path / "s2")], str(tmp_path / "joined"), Limits())
    second = prepare_share(whole, "2/2", tmp_path / "s2")
    join([first, second], str(tmp_path / "joined"), Limits())
    assert contents(first) == before
    assert contents(tmp_path / "joined") == contents(whole.output)


@pytest.fixture
def halves(whole, tmp_path) -> list[str]:
    return [prepare_share(whole, f"{k}/2", tmp_path / f"s{k}") for k in (1, 2)]


def test_a_killed_join_begins_anew(whole, halves, tmp_path, monkeypatch) -> None:
    from data import join as joining

    output = str(tmp_path / "joined")
    for name in ("Judge", "finish"):  # before and after the counts are on the disk
        with monkeypatch.context() as patch:
            original = getattr(joining, name)

            def stop(*arguments, original=original, name=name):
                if name == "finish":
                    arguments[0].commit()
                raise KeyboardInterrupt

            patch.setattr(joining, name, stop)
            with pytest.raises(KeyboardInterrupt):
                join(halves, output, Limits())
    join(halves, output, Limits())
    assert contents(output) == contents(whole.output)


def test_shares_that_are_no_whole_are_refused(whole, halves, tmp_path, tokenizer) -> None:
    third = prepare_share(whole, "1/3", tmp_path / "third")
    again = prepare_share(whole, "1/2", tmp_path / "again")
    fewer = replace(whole, sources=whole.sources[1:])
    other = prepare_share(fewer, "2/2", tmp_path / "other")
    first, second = halves
    for prefixes, message in [
        ([first], r"are not there once: 2 \(0 times\)"),
        ([first, again, second], r"are not there once: 1 \(2 times\)"),
        ([first, second, first], "is named twice"),
        ([first, third], "differs from .* in the number of shares"),
        ([first, other], "differs from .* in the inputs"),
        ([first, whole.output], "is a whole corpus, no share"),
        ([first, str(tmp_path / "nothing")], "is no finished share"),
    ]:
        with pytest.raises(ValueError, match=message):
            join(prefixes, str(tmp_path / "joined"), Limits())
    assert not contents(tmp_path / "joined")


def test_a_damaged_share_is_refused(halves, tmp_path) -> None:
    path = Path(f"{halves[1]}.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="s2: is not what its manifest says it is"):
        join(halves, str(tmp_path / "joined"), Limits())
    assert set(contents(tmp_path / "joined")) == {".rejects.jsonl"}


def places(value, path=()):
    """The way to everything that lies in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inside:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


@pytest.mark.parametrize("damage", [None, 7, "x", {}, "gone"])
def test_any_entry_of_a_share_that_is_damaged(whole, halves, tmp_path, damage) -> None:
    """Refused with the name of a share, or, where it only informs, joined to the whole's tokens."""
    path, joined = Path(f"{halves[0]}.manifest.json"), str(tmp_path / "joined")
    before = json.loads(path.read_text())
    for place in places(before):
        damaged = json.loads(path.read_text())
        *way, last = place
        inner = damaged
        for key in way:
            inner = inner[key]
        if damage == "gone":
            del inner[last]
        else:
            inner[last] = damage
        path.write_text(json.dumps(damaged))
        try:
            join(halves, joined, Limits())
        except ValueError as error:
            told = str(error)
            assert re.search(r"s[12](\.manifest\.json)?: (is|has|was|differs)|parts of", told), (
                place
            )
        else:
            for ending in (".bin", ".idx", ".subsets"):
                assert contents(joined)[ending] == contents(whole.output)[ending], place
        for file in tmp_path.glob("joined*"):
            file.unlink()
        path.write_text(json.dumps(before))


def test_a_source_that_changed_between_shares_is_noticed(tmp_path, tokenizer) -> None:
    """To another text of the same length, in the second half only."""
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS[:100])
    what = Preparation(look_over([str(path)]).sources, tokenizer.path, "")
    first = prepare_share(what, "1/2", tmp_path / "s1")
    content = path.read_bytes()
    path.write_bytes(content[:-30] + content[-30:].replace(b"Test", b"Tost"))
    second = prepare_share(what, "2/2", tmp_path / "s2")
    with pytest.raises(ValueError, match=r"s2: was made of another .*x\.jsonl than"):
        join([first, second], str(tmp_path / "joined"), Limits())


def test_what_is_above_a_limit_in_the_whole_is_refused_by_join(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS[:100])
    path.write_text(path.read_text() + "nonsense\n" * 5)
    what = Preparation(look_over([str(path)]).sources, tokenizer.path, "")
    prefixes = [prepare_share(what, f"{k}/2", tmp_path / f"s{k}") for k in (1, 2)]
    with pytest.raises(ValueError, match=r"5 of 105 records can't be used .* above --max-rejects"):
        join(prefixes, str(tmp_path / "joined"), Limits())
    assert join(prefixes, str(tmp_path / "joined"), Limits(rejects=0.1))["documents"] == 100


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/2", "1/0"])
def test_what_is_no_share(whole, text) -> None:
    with pytest.raises(ValueError, match=r"--shard .*is no share; write 3/16"):
        Share.parse(text, whole.sources)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="hf:owner/name is no file, and can't be divided"):
        Share.parse("1/2", [Source("hf:owner/name", "hf")])


def test_the_verbs(whole, tmp_path, prepare) -> None:
    inputs = ("--input", str(Path(whole.sources[0].name).parent))
    for k in (1, 2):
        prepare(*inputs, "--shard", f"{k}/2", output=f"s{k}")
    done = prepare("join", tmp_path / "s1", tmp_path / "s2", output="joined")
    assert "joined: 1,403 documents" in done.printed
    assert contents(tmp_path / "joined") == contents(whole.output)
    with pytest.raises(ValueError, match="--shard: every share needs the same tokenizer"):
        prepare(*inputs, "--shard", "1/2", "--train-tokenizer", "sentencepiece")
