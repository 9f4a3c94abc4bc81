"""One spelling of what lies on the hub."""

import pytest

from l2e.hub import is_hub, parse


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m", None),
        ("EleutherAI/pythia-70m@step13000", "EleutherAI/pythia-70m", "step13000"),
        ("hf:EleutherAI/pythia-70m@step13000", "EleutherAI/pythia-70m", "step13000"),
        ("hf:gpt2", "gpt2", None),
        ("hf:owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
    ],
)
def test_a_name_says_its_revision(name, repository, revision):
    assert parse(name) == (repository, revision)
    assert is_hub(name) == name.startswith("hf:")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path):
    (tmp_path / "run@home").mkdir()
    assert parse(tmp_path / "run@home") == (str(tmp_path / "run@home"), None)
    assert not is_hub(tmp_path)
