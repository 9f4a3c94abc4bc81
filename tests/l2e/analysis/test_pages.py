"""docs/notebook.md and the how-tos of the analyses: their code and commands run as they stand."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from l2e.analysis import analyses, analysis
from launch import analyze
from tests.l2e.analysis.conftest import byte_tokenizer, make_model, save_model, write_letters

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder where the pages' names exist: a model, checkpoints, passages."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("EleutherAI/pythia-70m", "checkpoints/step0", "checkpoints/step512"):
        save_model(folder / name)
    write_letters(folder / "languages.jsonl.gz")
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    """Such a folder to work in."""
    for entry in files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run_commands(page, language="bash"):
    lines = [
        line for block in blocks(page, language) for line in block.replace("\\\n", " ").split("\n")
    ]
    commands = [shlex.split(line) for line in lines if line]
    assert commands
    for python, script, *arguments in commands:
        assert (python, script) == ("python", "launch/analyze.py")
        analyze.main(arguments)


def test_the_notebook_page(place, capsys, monkeypatch):
    from launch.checkpoint import huggingface

    first, *others = blocks("notebook.md", "python")
    assert len(first.strip().splitlines()) - 2 <= 5, "five lines after the import"
    monkeypatch.setattr(huggingface, "in_hugging_face_form", lambda *_: "EleutherAI/pythia-70m")
    names: dict = {}
    exec(first, names)
    assert json.loads((place / "results" / "fkr.json").read_text())["curve"]
    assert "<td>0.1 %</td>" in names["result"].table()._repr_html_()
    assert names["result"].plot()._repr_html_().count("<img") == 2
    for block in others:
        exec(block, names)
    told = capsys.readouterr().out
    assert re.search(r"^English +L\d+\.N\d+ ", told, re.MULTILINE)
    assert re.search(r"^512 ", told, re.MULTILINE)
    assert [row["neuron"] for row in names["ablation"].values["neurons"]] == ["L0.N1", "L1.N2"]
    with pytest.raises(ValueError, match="no analysis 'x': there are scale, fkr"):
        names["run"]("x", names["subject"])
    with pytest.raises(ValueError, match="no feature passages"):
        names["run"]("fkr", names["Subject"]("EleutherAI/pythia-70m"))


def test_the_monitor_in_a_loop_of_ones_own(place):
    """docs/analysis.md, on a model of transformers."""
    [snippet] = blocks("analysis.md", "python")
    model, tokenizer = make_model("gpt_neox"), byte_tokenizer()

    @torch.no_grad()
    def observe(tokens, see):
        hidden = model(tokens, output_hidden_states=True).hidden_states
        for number, block in enumerate(model.gpt_neox.layers):
            inner = block.mlp.dense_h_to_4h(block.post_attention_layernorm(hidden[number]))
            see(number, block.mlp.act(inner))

    names = {"path": "languages.jsonl.gz", "tokenizer": tokenizer, "observe": observe}
    names |= {"micro_batch_size": 4, "step": 0, "tokens_per_step": 64}
    exec(snippet, names)
    layers = names["metrics"]["layers"]
    assert list(layers) == [0, 1, 2]
    assert all(layer["mean_ms"] > 0 <= layer["fkr"] <= 1 for layer in layers.values())


def test_how_to_add_an_analysis(place, monkeypatch):
    [source] = blocks("how_to/add_an_analysis.md", "python")
    module = types.ModuleType("l2e.analysis.outliers")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(analysis, "MODULES", (*analysis.MODULES, "outliers"))
    exec(source, module.__dict__)
    analyses.cache_clear()
    try:
        run_commands("how_to/add_an_analysis.md", "shell")  # no verb without the file
    finally:
        analyses.cache_clear()
    found = json.loads((place / "results" / "outliers.json").read_text())
    assert found["quantile"] == 0.9
    assert len(found["layers"]) == 2
    lines = json.loads((place / "results" / "trajectory.json").read_text())["lines"]
    assert "largest activation over the mean" in {line["measure"] for line in lines}
    assert (place / "results" / "outliers.png").is_file()


def test_how_to_read_a_report(place):
    run_commands("how_to/read_a_report.md")
    page = (place / "results" / "report.html").read_text()
    sections = re.findall(
        r"^\| ([^|]+?) \| [^|]+\?", (DOCS / "how_to/read_a_report.md").read_text(), re.M
    )
    titles = [analysis.title.split(" (")[0] for analysis in analyses().values()]
    assert sections == titles, "the table of the page is of all analyses, in their order"
    for title in titles:
        assert f"<h2>{title}" in page


def test_the_kept_report_is_small_and_says_what_is_seen():
    page = (DOCS / "analysis_report.html").read_text()
    assert len(page.encode()) < 400_000
    opening = page[page.index("</h1>") : page.index("<h2>")]
    assert "FKR" in opening or "False Killing Rate" in opening
    assert page.count("<table>") == page.count("<div class='wide'><table>"), "wide tables scroll"
