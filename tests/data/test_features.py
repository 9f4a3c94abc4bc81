"""Feature sets: balanced, without repeats, and no document on both sides of the split."""

import gzip
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from data.features import FeaturePreparation, build_features, cut_passages
from tests.data.conftest import make_texts

CODE = {
    "Python": [".py"],
    "C and C++ headers": [".h", ".hpp", ".hh"],
    "JavaScript": [".js", ".mjs"],
    "Perl": [".pl", ".pm"],
    "Shell": [".sh"],
    "HTML": [".html", ".htm"],
}
CODE_FOLDERS = ["/usr/include", "/usr/lib", "/usr/share", sysconfig.get_paths()["purelib"]]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def check_set(rows: list[dict], passages: int, features: set[str]) -> None:
    assert Counter(row["feature"] for row in rows) == dict.fromkeys(features, passages)
    assert len({row["text"] for row in rows}) == len(rows)
    splits = {}
    for row in rows:
        splits.setdefault(row["source"], set()).add(row["split"])
    assert all(len(sides) == 1 for sides in splits.values())


@pytest.fixture
def folder(tmp_path):
    """Three sub-folders of files; two of them hold the same files under other names."""
    for name, seed in (("one", 1), ("two", 2), ("few", 3)):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for i in range(2 if name == "few" else 30):
            text = "".join(make_texts(30, seed=100 * seed + i))
            for copy in ("a", "b"):
                (tmp_path / "texts" / name / f"{copy}{i}.txt").write_text(text)
    (tmp_path / "texts" / "loose.txt").write_text("of no feature")
    return tmp_path / "texts"


def test_folders(folder, tmp_path):
    what = FeaturePreparation([str(folder)], by="folder", passages=60)
    built = build_features(what, tmp_path / "x.jsonl.gz")
    assert built["left_out"].keys() == {"few"}
    rows = read(tmp_path / "x.jsonl.gz")
    check_set(rows, 60, {"one", "two"})
    assert Counter(row["source"] for row in rows).most_common(1)[0][1] <= what.per_document
    # Which side a document is on depends on its path, which is another one in each test run.
    assert {row["split"] for row in rows} == {"train", "test"}
    build_features(what, tmp_path / "again.jsonl.gz")
    assert (tmp_path / "again.jsonl.gz").read_bytes() == (tmp_path / "x.jsonl.gz").read_bytes()


def test_what_is_not_used_is_counted(folder, tmp_path):
    """Of folders: what is no corpus, links, and files that are no text; of records the others."""
    for name in (".git/objects", "one/.hidden", "one/a0.txt~"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(make_texts(9)))
    (folder / "linked").symlink_to(folder / "two")
    (folder / "one" / "link.txt").symlink_to(folder / "two" / "a0.txt")
    (folder / "few" / "a_picture.png").write_bytes(b"\x89PNG" + bytes(range(256)))
    built = build_features(FeaturePreparation([str(folder)], "folder", passages=60), tmp_path / "x")
    assert set(built["documents"]) == {"one", "two"}
    assert built["passed_over"] == {
        "hidden": 2,
        "an editor's or a program's copy": 1,
        "a link": 2,
        "invalid UTF-8": 1,
    }
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(make_texts(40))]
    lines = [*map(json.dumps, rows), "nonsense", '{"label": "a"}', '{"text": "x"}', '{"text": "y"}']
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    what = FeaturePreparation(
        [str(tmp_path / "records.jsonl")], "field", "label", passages=5, characters=50
    )
    assert build_features(what, tmp_path / "y")["passed_over"] == {
        "broken JSON": 1,
        "field 'text'": 1,
        "no text in the field 'label'": 2,
    }


def test_records_with_a_label(tmp_path):
    lines = [
        {"text": "".join(make_texts(20, seed=i)), "meta": {"language": f"L{i % 3}"}}
        for i in range(60)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    what = FeaturePreparation(
        [str(tmp_path / "x.jsonl")], by="field", label="meta.language", passages=20
    )
    build_features(what, tmp_path / "out.jsonl.gz")
    check_set(read(tmp_path / "out.jsonl.gz"), 20, {"L0", "L1", "L2"})


def test_code_language_from_the_machines_own_files(tmp_path):
    """The set the papers call Code Language, from whatever source files are installed."""
    folders = [folder for folder in CODE_FOLDERS if Path(folder).is_dir()]
    what = FeaturePreparation(folders, by="extension", groups=CODE, passages=20)
    try:
        built = build_features(what, tmp_path / "code.jsonl.gz")
    except ValueError as error:
        pytest.skip(f"too few source files are installed: {error}")
    if built["left_out"]:
        pytest.skip(f"too few source files are installed: {built['left_out']}")
    rows = read(tmp_path / "code.jsonl.gz")
    check_set(rows, 20, set(CODE))
    signs = {
        "Python": ("import ", "def ", "self.", "return ", "assert", '"""', " = "),
        "C and C++ headers": ("#define", "#if", "#include", "/*", "//", ");"),
        "HTML": ("</", "/>", "<p", "<!"),
        "Perl": ("$", "=head", "sub "),
    }
    for name, any_of in signs.items():
        texts = [row["text"] for row in rows if row["feature"] == name]
        assert sum(any(sign in text for sign in any_of) for text in texts) > len(texts) / 2


def test_passages_end_where_words_do():
    text = "".join(make_texts(40))
    passages = list(cut_passages(text, 600))
    assert "".join(" ".join(passages).split()) in "".join(text.split())
    assert all(600 <= len(passage) <= 620 for passage in passages[:-1])
    for passage in passages[:-1]:
        assert text[text.index(passage) + len(passage)].isspace()


def test_a_word_without_end_is_cut():
    assert [len(passage) for passage in cut_passages("x" * 2000, 600)] == [750, 750, 500]


def test_too_few_features_are_an_error(folder, tmp_path):
    what = FeaturePreparation([str(folder)], by="folder", passages=100_000)
    with pytest.raises(ValueError, match=r"fewer than two features have so many \(.*few \d+"):
        build_features(what, tmp_path / "x.jsonl.gz")
    assert not (tmp_path / "x.jsonl.gz").exists()
