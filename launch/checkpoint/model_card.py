"""README.md of an exported model: what it was trained on and how, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from data.files import read_json
from launch.checkpoint.stored import StoredCheckpoint
from launch.planning.cost import parameters

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt_neox
- l2e
---
"""
LOAD = """## How to load it

```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("{name}"){tokenizer_line}
```
"""
# Of the configuration's sections, what shaped the weights.
SECTIONS = ("l2e", "optimizer", "schedule", "train", "parallel")
LIBRARIES = ("torch", "transformers")


def model_card(source: StoredCheckpoint, name: str, tokenizer: bool) -> str:
    """The card of `source` exported into the folder `name`, with its tokenizer or without."""
    run = read_json(source.run / "manifest.json") or {} if source.run else {}
    shape = source.model_config
    parts = [
        HEAD,
        f"# {name}\n",
        f"A GPT-NeoX language model of {parameters(shape):,} parameters: {shape.num_layers} "
        f"blocks x {shape.hidden_size}, {shape.num_attention_heads} heads, a vocabulary of "
        f"{shape.vocab_size:,}, texts of up to {shape.max_position_embeddings:,} tokens.\n",
        table("Training", training(source)),
        table("Scores", scores(source)),
        *(
            f"## {section}\n\n```json\n{json.dumps(source.config[section], indent=1)}\n```\n"
            for section in SECTIONS
            if section in source.config
        ),
        table("Versions", versions(run)),
        LOAD.format(
            name=name,
            tokenizer_import=", AutoTokenizer" if tokenizer else "",
            tokenizer_line=f'\ntokenizer = AutoTokenizer.from_pretrained("{name}")'
            if tokenizer
            else "",
        ),
    ]
    return "\n".join(part for part in parts if part)


def table(title: str, rows: Iterator[tuple[str, object]]) -> str:
    """A section with a table; nothing where there is nothing to tell."""
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""]) if lines else ""


def training(source: StoredCheckpoint) -> Iterator[tuple[str, object]]:
    """Steps, tokens and data, the data with its hashes."""
    state, config = source.state, source.config
    if "source" in state:
        yield "weights from", f"`{state['source']}`"
    yield "steps", f"{state['step']:,}"
    yield "tokens", f"{state['tokens']:,}"
    if method := config.get("l2e", {}).get("method"):
        yield "method", f"{method}, weight {config['l2e'].get('weight')}"
    if path := config.get("data", {}).get("path"):
        yield "data", f"`{path if isinstance(path, str) else json.dumps(path)}`"
    identity = state.get("data", {}).get("training", {})
    for number, part in enumerate(identity.get("parts", [identity]), 1):
        for key in ("tokens_sha256", "index_sha256", "tokenizer_sha256"):
            if part.get(key):
                file = f" of file {number}" if "parts" in identity else ""
                yield f"{key}{file}", f"`{part[key]}`"


def scores(source: StoredCheckpoint) -> Iterator[tuple[str, object]]:
    """What the run's results say of this very step."""
    if source.run is None:
        return
    results = source.run / "results"
    for path in sorted(results.glob(f"evaluate_*_step_{source.state['step']:07d}.json")):
        report = read_json(path) or {}
        for task, metrics in report.get("results", {}).items():
            shots = report.get("shots", {}).get(task, 0)
            for metric, value in metrics.items():
                if not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr")
                    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                    yield f"{task}, {metric}, {shots} shots", f"{value:.4f}{spread}"


def versions(run: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Of the libraries that trained it, and that exported it."""
    for library, version in run.get("versions", {}).items():
        yield f"trained with {library}", version
    if run.get("git_commit"):
        yield "trained at commit", run["git_commit"]
    for library in LIBRARIES:
        yield f"exported with {library}", metadata.version(library)


def write_model_card(source: StoredCheckpoint, folder: Path, name: str, tokenizer: bool) -> None:
    """Write README.md into an export that will be called `name`."""
    (folder / "README.md").write_text(model_card(source, name, tokenizer), "utf-8")
