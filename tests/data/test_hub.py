"""Token files as the hub keeps them: one index, and the tokens in numbered parts."""

from pathlib import Path

import pytest

from data.hub import fetch_tokenizer, fetch_tokens, join_parts


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    source = tmp_path / "snapshot"
    source.mkdir()
    for number, content in ((1, b"cd"), (0, b"ab"), (2, b"e")):
        (source / f"document-{number:05d}-of-00002.bin").write_bytes(content)
    (source / "document.idx").write_bytes(b"index")
    prefix = join_parts(source, tmp_path / "local" / "pile")
    assert Path(f"{prefix}.bin").read_bytes() == b"abcde"
    assert Path(f"{prefix}.idx").read_bytes() == b"index"
    (source / "document-00000-of-00002.bin").unlink()  # what is joined is not joined again
    assert join_parts(source, tmp_path / "local" / "pile") == prefix
    assert Path(f"{prefix}.bin").read_bytes() == b"abcde"


@pytest.mark.parametrize("name", ["hf:nobody/nothing", "hf:nobody/nothing@old", "hf:a/b/c"])
def test_what_cannot_be_fetched_is_told(tmp_path: Path, monkeypatch, name) -> None:
    """Without a network, and by a name that no repository has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"tokenizer = '{name}': cannot be fetched.*HF_TOKEN"):
        fetch_tokenizer(name)
    with pytest.raises(ValueError, match=rf"data\.path = '{name}': cannot be fetched.*HF_TOKEN"):
        fetch_tokens(name, tmp_path)


def test_a_whole_file_is_linked_not_copied(tmp_path: Path) -> None:
    for ending in ("bin", "idx"):
        (tmp_path / f"document.{ending}").write_bytes(ending.encode())
    prefix = join_parts(tmp_path, tmp_path / "local" / "pile")
    assert Path(f"{prefix}.bin").is_symlink()
    assert Path(f"{prefix}.bin").read_bytes() == b"bin"


def test_a_repository_without_token_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 \.bin and 0 \.idx"):
        join_parts(tmp_path, tmp_path / "local")
