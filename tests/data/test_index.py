"""Our token files against megatron-core's own reader and writer, and damaged ones."""

import numpy as np
import pytest
import torch

from data import index
from data.index import TokenFile, bin_path, idx_path
from tests.data.conftest import random_documents, write_tokens

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 7)  # several chunks and a rest
    documents = [*random_documents(40), np.array([], int), np.array([1])]
    theirs = megatron.IndexedDataset(write_tokens(tmp_path / "ours", documents, dtype))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    for document, expected in enumerate(documents):
        assert theirs[document].dtype == dtype
        np.testing.assert_array_equal(theirs[document], expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_megatrons(tmp_path, dtype):
    documents = random_documents(40)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = TokenFile(tmp_path / "theirs")
    assert ours.dtype == dtype
    assert len(ours) == len(documents)
    for number, expected in enumerate(documents):
        np.testing.assert_array_equal(ours.read(number), expected)
        np.testing.assert_array_equal(ours.read(number, 0, 1), expected[:1])


def test_both_write_the_same_bytes(tmp_path):
    documents = random_documents(25)
    write_tokens(tmp_path / "ours", documents)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{who}.{end}" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def _set(offset: int, value: bytes):
    def damage(content: bytes) -> bytes:
        return content[:offset] + value + content[offset + len(value) :]

    return damage


@pytest.mark.parametrize(
    ("end", "damage", "message"),
    [
        ("idx", lambda c: c[:20], "truncated, 20 bytes"),
        ("idx", lambda c: c[:-3], "truncated, 30 documents"),
        ("idx", lambda c: c + b"\0", "too long"),
        ("idx", _set(0, b"TNTIDX\0\0"), "wrong magic"),
        ("idx", _set(9, b"\2"), "version 2"),
        ("idx", _set(17, b"\7"), "type code 7"),
        ("idx", _set(17, b"\4"), "doesn't follow from the lengths before it, in tokens of int32"),
        ("idx", _set(34, b"\xff\xff\xff\xff"), "negative length of document 0"),
        ("idx", _set(-8, b""), "bounds"),
        ("bin", lambda c: c[:-2], "truncated, its index needs"),
        ("bin", lambda c: c + c, "too long, its index needs"),
        ("bin", lambda c: b"", "holds no tokens"),
    ],
)
def test_damage_is_named(tmp_path, end, damage, message):
    prefix = write_tokens(tmp_path / "x", random_documents(30))
    path = tmp_path / f"x.{end}"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\1" * 8 if message == "bounds" else damage(content))
    with pytest.raises(ValueError, match=message) as error:
        TokenFile(prefix)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("missing", [bin_path, idx_path])
def test_missing_half_is_named(tmp_path, missing):
    prefix = write_tokens(tmp_path / "x", random_documents(3))
    missing(prefix).unlink()
    with pytest.raises(ValueError, match="no such file") as error:
        TokenFile(prefix)
    assert str(missing(prefix)) in str(error.value)
