"""The pages that are written from the code are those that the code would write now."""

from pathlib import Path

import pytest

from tests.launch.running import ROOT, succeeds


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What `make docs` writes, elsewhere."""
    folder = tmp_path_factory.mktemp("docs")
    succeeds("docs/build.py", folder)
    return folder


def test_pages_from_the_code_are_fresh(built) -> None:
    written = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    kept = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs" / "api").rglob("*.html")}
    assert written - {Path("configuration.md")} == kept, "run `make docs`"
    for name in written:
        assert (built / name).read_text() == (ROOT / "docs" / name).read_text(), (
            f"docs/{name} is stale: run `make docs`"
        )


def test_the_configuration_page_has_every_key(built) -> None:
    from configs.loading import keys

    page = (built / "configuration.md").read_text()
    for key in keys():
        assert f"| `{key.name.rpartition('.')[2]}` |" in page
