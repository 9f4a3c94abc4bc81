"""The files that install the project: they name what exists, and agree with each other."""

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import yaml

from tests.launch.running import ROOT, succeeds

PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def instructions(kind: str) -> list[list[str]]:
    """The arguments of every Dockerfile instruction of one kind, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [words[1:] for words in lines if words[0] == kind]


def test_dockerfile_copies_files_that_exist() -> None:
    copies = instructions("COPY")
    assert copies
    for *sources, _ in copies:
        for source in sources:
            assert (ROOT / source).exists(), source


def test_dockerfile_base_is_official_and_has_the_pinned_torch() -> None:
    [[base]] = instructions("FROM")
    image, _, tag = base.partition(":")
    assert image == "pytorch/pytorch"
    assert tag.split("-")[0] == PINS["torch"]
    assert "cuda" in tag


def test_dockerfile_installs_with_the_constraints_and_copies_every_package() -> None:
    [command] = [" ".join(words) for words in instructions("RUN")]
    assert "constraints.txt" in command
    assert "[train]" in command
    copied = {source.rstrip("/") for *sources, _ in instructions("COPY") for source in sources}
    assert {"configs", "data", "l2e", "launch", "model"} <= copied


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {canonical(name) for name in PINS}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (entry for group in groups for entry in group):
        name = re.match(r"[\w.-]+", requirement).group()
        assert name == "l2e" or canonical(name) in pins, name


def test_what_is_installed_has_every_source_of_the_method(tmp_path) -> None:
    """Also what is no Python: C that is compiled where it runs."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "l2e", tmp_path / "l2e")
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = succeeds("-c", build, cwd=tmp_path)
    installed = set(zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    sources = [path for path in (ROOT / "l2e").rglob("*") if path.suffix in (".py", ".c")]
    assert {str(path.relative_to(ROOT)) for path in sources} <= installed


def test_the_citation_file_names_the_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    urls = {reference["url"] for reference in citation["references"]}
    assert urls >= {
        f"https://arxiv.org/abs/{n}" for n in ("2503.23298", "2312.11560", "2402.09099")
    }


def test_pip_install_gives_l2e_with_torch_alone(tmp_path: Path) -> None:
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    succeeds(*pip, "--target", tmp_path, ROOT)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"l2e"}
    assert not (tmp_path / "launch").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import l2e; print(l2e.__file__);"
        "print(sorted({'pydantic', 'megatron', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    imported = succeeds("-I", "-c", code)
    assert imported.stdout.splitlines() == [str(tmp_path / "l2e" / "__init__.py"), "[]"]
