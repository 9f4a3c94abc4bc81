"""What of a folder is read, what isn't, and that both are told."""

import json
import os
from pathlib import Path

import pytest

from data.corpus import look_over
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(30)


def write(path: Path, content: str = "not corpus") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(folder: Path) -> list[str]:
    return [str(Path(source.name).relative_to(folder)) for source in look_over([str(folder)])[0]]


def test_what_lies_beside_a_downloaded_data_set_is_not_read_but_listed(tmp_path, prepare) -> None:
    folder = tmp_path / "in"
    for name in (
        *(".git/HEAD", ".cache/huggingface/x.jsonl", ".ipynb_checkpoints/a.txt", ".gitattributes"),
        *("__MACOSX/._a.jsonl", "data/Thumbs.db", "desktop.ini", ".DS_Store"),
        *("README.md", "data/README", "LICENSE", "dataset_infos.json", "_SUCCESS", "SHA256SUMS"),
        *("out.rejects.jsonl", "old.partial/tokens"),
        *("data/a.jsonl~", "data/a.jsonl.bak", "#a.jsonl#", "a.jsonl.orig", "data/a.jsonl.tmp2"),
        *("b.jsonl.part", "data/c.jsonl.gz.crdownload"),
    ):
        write(folder / name)
    os.mkfifo(folder / "pipe")
    write_jsonl(folder / "data" / "a.jsonl", TEXTS)
    done = prepare("--input", folder)
    assert done.texts == TEXTS
    assert [entry["name"] for entry in done.manifest["sources"]] == [str(folder / "data/a.jsonl")]
    passed_over = {
        reason: {str(Path(name).relative_to(folder)) for name in found}
        for reason, found in done.manifest["passed_over"].items()
    }
    assert passed_over == {
        "hidden": {".git", ".cache", ".ipynb_checkpoints", ".gitattributes", ".DS_Store"},
        "of the operating system": {"__MACOSX", "data/Thumbs.db", "desktop.ini"},
        "an interrupted preparation": {"old.partial"},
        "rejects of a preparation": {"out.rejects.jsonl"},
        "an editor's or a program's copy": {
            *("data/a.jsonl~", "data/a.jsonl.bak", "#a.jsonl#", "a.jsonl.orig"),
            "data/a.jsonl.tmp2",
        },
        "an unfinished download": {"b.jsonl.part", "data/c.jsonl.gz.crdownload"},
        "about the data": {
            *("README.md", "data/README", "LICENSE", "dataset_infos.json", "_SUCCESS"),
            "SHA256SUMS",
        },
        "no regular file": {"pipe"},
    }
    assert "read as JSON lines, a record a line: 1 (" in done.printed
    for reason, found in passed_over.items():
        assert f"not read, {reason}: {len(found)} (" in done.printed


def test_a_readme_is_corpus_where_it_tells_of_no_data_set(tmp_path) -> None:
    """In a collection of repositories it is among the best of their text."""
    write(tmp_path / "README.md")
    for name in ("one/README.md", "one/code.py", "two/docs/README.rst"):
        write(tmp_path / name)
    assert names(tmp_path) == ["one/README.md", "one/code.py", "two/docs/README.rst"]


def test_what_is_named_is_read_whatever_its_name(tmp_path) -> None:
    write(tmp_path / ".hidden" / "README.md")
    for name in (tmp_path / ".hidden" / "README.md", tmp_path / ".hidden" / "*"):
        assert len(look_over([str(name)]).sources) == 1


def test_a_pattern_meets_what_nobody_named(tmp_path, monkeypatch) -> None:
    """Files that we wrote ourselves, and what tells of the data."""
    monkeypatch.chdir(tmp_path)
    made = ("out.bin", "out.idx", "out.manifest.json", "out.rejects.jsonl", "gone.rejects.jsonl")
    for name in (*made, "README.md", "more/LICENSE", "thumbs.db", "old.partial/tokens"):
        write(tmp_path / name)
    for name in ("a.jsonl", "out.jsonl", "more/b.jsonl"):
        write_jsonl(tmp_path / name, TEXTS)

    def read(*patterns: str) -> list[str]:
        return [source.name for source in look_over([*patterns]).sources]

    assert read("*.jsonl") == ["a.jsonl", "out.jsonl"]
    assert read("*") == ["a.jsonl", "more/b.jsonl", "out.jsonl"]
    assert read("**/*") == ["a.jsonl", "more/b.jsonl", "out.jsonl"]
    assert read("*.md", "out.rejects.jsonl") == ["README.md", "out.rejects.jsonl"]
    assert look_over(["*.jsonl"]).passed_over == {
        "rejects of a preparation": ["gone.rejects.jsonl", "out.rejects.jsonl"]
    }


def test_a_folder_may_be_named_like_a_file(tmp_path) -> None:
    write_jsonl(write(tmp_path / "x.jsonl" / "part-0.jsonl"), TEXTS)
    assert names(tmp_path) == ["x.jsonl/part-0.jsonl"]
    assert names(tmp_path / "x.jsonl") == ["part-0.jsonl"]


def test_links_are_followed_once(tmp_path, prepare) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    write_jsonl(write(elsewhere / "deep" / "b.jsonl"), TEXTS[10:20])
    write_jsonl(write(folder / "a.jsonl"), TEXTS[:10])
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    (folder / "z_again.jsonl").symlink_to(folder / "a.jsonl")
    os.link(folder / "a.jsonl", folder / "z_hard.jsonl")
    done = prepare("--input", folder)
    assert done.texts == TEXTS[:20]
    again = done.manifest["passed_over"]["the same file again"]
    assert again == [f"{folder / name} is {folder / 'a.jsonl'}" for name in
                     ("z_again.jsonl", "z_hard.jsonl")]  # fmt: skip
    loops = [str(folder / "loop"), str(folder / "linked" / "deep" / "up")]
    assert done.manifest["passed_over"]["the same folder again"] == loops
    assert "not read, the same file again: 2 (" in done.printed


def test_two_names_of_one_file_on_the_command_line_are_one_file(tmp_path, monkeypatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    found = look_over(["a.jsonl", str(tmp_path / "a.jsonl"), "b.jsonl"])
    assert [source.name for source in found.sources] == ["a.jsonl"]
    assert len(found.passed_over["the same file again"]) == 2


@pytest.mark.parametrize("named", ["", "broken.jsonl", "*.jsonl"])
def test_a_broken_link_is_an_error(tmp_path, named) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"broken\.jsonl: is a broken link"):
        look_over([str(tmp_path / named)])


def test_a_hubs_cache_is_read_by_the_names_of_its_snapshot(tmp_path) -> None:
    """There the files are links into a store without names, where a README can't be told."""
    for number, (name, content) in enumerate(
        {"README.md": "about it", "train.jsonl": json.dumps({"text": "a"})}.items()
    ):
        blob = write(tmp_path / "blobs" / str(number), content)
        (tmp_path / "snapshots" / "main").mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshots" / "main" / name).symlink_to(blob)
    write(tmp_path / "refs" / "main")
    assert names(tmp_path) == ["snapshots/main/train.jsonl"]


def test_a_folder_with_nothing_to_read_says_what_it_holds(tmp_path) -> None:
    write(tmp_path / ".git" / "HEAD")
    with pytest.raises(ValueError, match="holds no files but 1 hidden"):
        look_over([str(tmp_path)])


def test_preparing_into_the_folder_that_is_read(tmp_path, prepare) -> None:
    """A second time, the first one's files are no corpus."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = prepare("--input", tmp_path)
    second = prepare("--input", tmp_path, output="again")
    assert second.texts == first.texts == TEXTS
    assert "out.bin" in str(second.manifest["passed_over"]["prepared already"])
