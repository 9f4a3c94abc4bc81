"""The small files that went wrong, each with what a user expects of it."""

from pathlib import Path

import pytest

from tests.cases.conftest import SHARED_CASES

APPLES = [f"Document number {i} is about apples and pears." for i in range(200)]
ROWS = [f"text number {i} of the table" for i in range(50)]
READ = {
    "upper.JSONL": (APPLES, {"X": 200}),
    "shard.jl": (APPLES, {"X": 200}),
    "c.jsonl.zstd": (APPLES, {"X": 200}),
    "long28.jsonl.zst": (APPLES, {"X": 200}),
    "bom_small.jsonl": (APPLES[:20], {"X": 20}),
    "dotted.parquet": (ROWS, {"": 50}),
    "binary.parquet": (ROWS, {"": 50}),
    "metastr.jsonl": (ROWS, {"Pile-CC": 50}),
}
REFUSED = {
    "table.csv": r"is a table \(CSV\)",
    "zero.jsonl.zst": "is empty: 0 bytes",
    "hurt2nd.jsonl.xz": "damaged or unreadable after record 101",
    "trail.jsonl.xz": "damaged or unreadable after record 200",
    "lfs.jsonl": "is a Git LFS pointer",
    "lfs.txt": "is a Git LFS pointer",
}
SEEN = {*READ, *REFUSED, "big.jsonl", "half_chinese.jsonl", "tok"}


@pytest.fixture(scope="module")
def files(shared_cases) -> Path:
    return shared_cases / "files"


def test_no_case_is_left_out(files) -> None:
    assert {path.name for path in files.iterdir()} == SEEN


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read(files, prepare, name) -> None:
    texts, subsets = READ[name]
    field = "content.text" if name == "dotted.parquet" else "text"
    done = prepare("--input", files / name, "--text-field", field)
    assert done.texts == texts
    assert {key: of["documents"] for key, of in done.manifest["subsets"].items()} == subsets


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_its_name_however_large_the_rest(files, prepare, name) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        prepare("--input", files / "big.jsonl", files / name)
    assert str(files / name) in str(error.value)


@pytest.mark.parametrize("name", ["wordlevel.json", "spdefault.model"])
def test_half_chinese_is_half_unknown(files, prepare, name) -> None:
    file = files / "tok" / name
    command = ("--input", files / "half_chinese.jsonl", "--tokenizer", file)
    with pytest.raises(ValueError, match=r"has nothing for .* \(5\d\.\d%\), as in '今天天气很好"):
        prepare(*command, file=file)
    done = prepare(*command, "--max-unknown", 0.9, file=file)
    assert done.manifest["documents"] == 200
    assert "'</s>' is written out 100 times" in done.printed


def test_gemma_like_documents_end_with_eos(files, prepare) -> None:
    file = files / "tok" / "gemmalike.json"
    done = prepare("--input", files / "upper.JSONL", "--tokenizer", file, file=file)
    assert "documents end with '<eos>' (id 1)" in done.printed
    assert all(done.tokens.read(i)[-1] == 1 for i in range(len(done.tokens)))
    assert done.texts == APPLES


def test_a_tokenizer_that_is_a_pointer_is_refused_when_named(files, prepare) -> None:
    file = files / "tok" / "lfs.json"
    with pytest.raises(ValueError, match=r"lfs\.json: is a Git LFS pointer"):
        prepare("--input", files / "upper.JSONL", "--tokenizer", file, file=file)


@pytest.mark.skipif(not SHARED_CASES.is_dir(), reason=f"cases not present at {SHARED_CASES}")
@pytest.mark.parametrize("key", ["tokenizer.path", "data.path"])
def test_a_configuration_with_the_pointer_is_refused(files, tmp_path, key) -> None:
    """Also where the corpus is on the hub, and so not checked yet."""
    import configs

    pointer = files / "tok" / "lfs.json"
    corpus = "hf:owner/name" if key == "data.path" else str(tmp_path / "nowhere")
    settings = [f"data.path={corpus}", f"tokenizer.path={pointer}"]
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        configs.load("configs/70m.json", settings)
