"""Inputs like those that users of other stacks report, and the verb that reads them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data import manifest
from data.index import TokenFile
from data.tokenizer import load_tokenizer
from launch import prepare as verb
from tests.data.conftest import tokenizer  # noqa: F401

SHARED_CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """The folder of small inputs that went wrong; skips where it is absent."""
    if not SHARED_CASES.is_dir():
        pytest.skip(f"cases not present at {SHARED_CASES}")
    return SHARED_CASES


@pytest.fixture
def prepare(tmp_path, capsys, tokenizer):  # noqa: F811
    """`prepare.py ARGUMENTS --output tmp_path/out`, in this process.

    Gives what it printed, the manifest and the documents' texts; a user's mistake raises.
    """

    def run(*arguments, output: str = "out", file=tokenizer.path) -> SimpleNamespace:
        named = ["--tokenizer", file]
        if "--tokenizer" in arguments or "join" in arguments:
            named = []
        capsys.readouterr()
        verb.main([*map(str, arguments), *map(str, named), "--output", str(tmp_path / output)])
        tokens = TokenFile(tmp_path / output)
        opened = load_tokenizer(file)
        return SimpleNamespace(
            printed=capsys.readouterr().out,
            manifest=manifest.read(tmp_path / output),
            tokens=tokens,
            texts=[opened.decode(tokens.read(i)[:-1]) for i in range(len(tokens))],
        )

    return run
