"""Train a Llama of transformers with L2E in a plain loop, as one run of an experiment or by itself.

    python docs/how_to/train_llama.py --config configs/demo.json --run-dir runs/llama
    python launch/experiment.py configs/experiments/llama.json --output runs/llama --workers 2

The configuration is that of launch/pretrain.py, and the run's folder is, too, so that plans,
reports and compare.py take it for one. Of `model` the sizes count, what is GPT-NeoX's own does not;
`parallel`, `checkpoint` and `deepspeed` mean nothing here: one process, one device, fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

import configs
import l2e
from configs import Config
from data import batches, load_tokenizer
from data.files import write_json, write_text
from l2e.config import select_layers
from launch import cli
from launch.engine.hardware import describe
from launch.training import data
from launch.training.folder import CONFIG, FINISHED, MANIFEST, METRICS, set_aside
from launch.training.logs import MetricsFile
from launch.training.position import Position
from launch.training.provenance import circumstances
from launch.training.schedule import learning_rate

NEURONS = "model.layers.*.mlp.act_fn"  # a neuron's activation: SiLU of its gate
STATE = "state.pt"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    config = configs.load(options.config, options.set)
    refuse_unknown(config)
    folder = cli.run_folder(options)
    if options.resume == "none" and (folder / METRICS).exists():
        raise ValueError(f"--run-dir {folder}: holds a run already; go on with it by --resume auto")
    folder.mkdir(parents=True, exist_ok=True)
    train(config, folder)
    return 0


def parser() -> argparse.ArgumentParser:
    result = cli.verb_parser(__doc__)
    cli.add_configuration(result)
    cli.add_run_folder(result)
    result.add_argument(
        "--resume", choices=["none", "auto"], default="none", help="auto: from the last evaluation"
    )
    return result


def refuse_unknown(config: Config) -> None:
    """Raise ValueError for what the configuration asks of a run and this loop does not do."""
    asked = {
        "train.dtype, other than fp32": config.train.dtype != "fp32",
        "train.stop_after": config.train.stop_after is not None,
        "train.on_nonfinite, other than stop": config.train.on_nonfinite != "stop",
        "evaluate.tasks": bool(config.evaluate.tasks),
        "parallel sizes above 1": config.parallel.tensor * config.parallel.pipeline > 1,
    }
    if unknown := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(f"this loop knows nothing of {'; '.join(unknown)}: leave them out")


def train(config: Config, folder: Path) -> None:
    """All steps, or those that are left."""
    corpus = data.open_corpus(config, folder, data.fetch(config, folder), Position())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.train.seed)
    model = build(config).to(device)
    optimizer = adamw(config, model)
    handle = l2e.attach(model, NEURONS, config.l2e)
    done = resume(folder, model, optimizer, handle)
    begin(config, folder, corpus, done, device)

    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    read = batches(corpus.training, done * size, size, micro)
    metrics = Metrics(config, folder)
    for step in range(done, config.train.steps):
        handle.controller.measure = metrics.start(step + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = torch.zeros((), device=device)
        for _ in range(size // micro):
            language_loss = loss_of(model, next(read).to(device))
            ((language_loss + handle.loss()) * micro / size).backward()
            loss += language_loss.detach() * micro / size
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
        metrics.add(step + 1, loss, norm, handle)
        if look_due(config, step + 1):
            metrics.write(step + 1, look(config, model, corpus, step + 1))
            save(folder, step + 1, model, optimizer, handle)
    (folder / FINISHED).touch()


def build(config: Config) -> nn.Module:
    """A Llama of the configuration's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            max_position_embeddings=config.data.sequence_length,
            use_cache=False,
        )
    )
    if config.l2e.method == "silence":
        # The method acts in training alone; so that these MLPs are off in evaluation as well,
        # they begin at 0, where they get no gradient while their input is 0.
        for block in inhibited(config):
            nn.init.zeros_(model.model.layers[block].mlp.down_proj.weight)
    return model


def inhibited(config: Config) -> tuple[int, ...]:
    return select_layers(config.l2e.layers, config.model.num_layers)


def adamw(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Matrices are decayed, norms are not."""
    wanted = config.optimizer
    parameters = [*model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": wanted.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, wanted.learning_rate, wanted.betas, wanted.eps)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss (nats/token) of [batch, length + 1] tokens."""
    logits = model(tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# --- what is measured ---------------------------------------------------------------------------


def look_due(config: Config, step: int) -> bool:
    interval = config.evaluate.interval
    return step in (1, config.train.steps) or bool(interval and step % interval == 0)


def look(config: Config, model: nn.Module, corpus: data.Corpus, step: int) -> dict[str, Any]:
    """The validation loss; after the last step also what the inhibited MLPs are worth, and FKR and
    K-S on the feature set."""
    model.eval()
    found: dict[str, Any] = {"validation_loss": validate(config, model, corpus)}
    if step == config.train.steps and config.evaluate.layer_worth:
        asked = {str(block): {block} for block in inhibited(config)}
        asked["together"] = set(inhibited(config))
        found["layer_worth"] = {}
        for name, blocks in asked.items():
            with without_mlps(model, blocks):
                rise = validate(config, model, corpus) - found["validation_loss"]
            found["layer_worth"][name] = rise
    if step == config.train.steps and config.monitor.features:
        found["monitor"] = on_features(config, model, corpus)
    model.train()
    return found


@torch.no_grad()
def validate(config: Config, model: nn.Module, corpus: data.Corpus) -> float:
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    device = next(model.parameters()).device
    read = islice(
        batches(corpus.validation, 0, size, micro), config.evaluate.batches * size // micro
    )
    losses = [loss_of(model, tokens.to(device)) for tokens in read]
    return float(torch.stack(losses).mean())


@contextmanager
def without_mlps(model: nn.Module, blocks: set[int]) -> Iterator[None]:
    """The model with the MLPs of some blocks taken out."""
    hooks = [
        model.model.layers[block].mlp.register_forward_hook(
            lambda _, inputs, output: torch.zeros_like(output)
        )
        for block in blocks
    ]
    yield
    for hook in hooks:
        hook.remove()


def on_features(config: Config, model: nn.Module, corpus: data.Corpus) -> dict[str, Any]:
    """{block: {mean_ms, ks, fkr}} on the passages of `monitor.features`."""
    from l2e.analysis.features import read_features
    from l2e.analysis.monitor import Monitor

    assert corpus.paths.tokenizer is not None, "monitor.features needs the corpus's tokenizer"
    device = next(model.parameters()).device

    @torch.no_grad()
    def observe(tokens: Tensor, see: Any) -> None:
        hooks = [
            layer.mlp.act_fn.register_forward_hook(
                lambda _, inputs, output, number=str(number): see(number, output)
            )
            for number, layer in enumerate(model.model.layers)
        ]
        model.model(tokens.to(device))
        for hook in hooks:
            hook.remove()

    monitor = Monitor(
        read_features(config.monitor.features).sample(config.monitor.passages),
        load_tokenizer(corpus.paths.tokenizer),
        batch_size=config.train.micro_batch_size,
        max_tokens=min(config.monitor.tokens, config.data.sequence_length),
    )
    return monitor.run(observe)["layers"]


# --- the run's folder ---------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: a line a step, fetched from the device every `logging.interval` steps."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.file = config, MetricsFile(folder / METRICS)
        self.pending: list[dict[str, Any]] = []
        self.since = time.monotonic()

    def start(self, step: int) -> bool:
        """Whether the step that begins is measured. The clock runs from write to write, without
        what is done in between."""
        if not self.pending:
            self.since = time.monotonic()
        return self.due(step)

    def due(self, step: int) -> bool:
        return step % self.config.logging.interval == 0 or look_due(self.config, step)

    def add(self, step: int, loss: Tensor, norm: Tensor, handle: l2e.Handle) -> None:
        tokens = step * self.config.train.global_batch_size * self.config.data.sequence_length
        self.pending.append({"step": step, "tokens": tokens, "lm_loss": loss, "grad_norm": norm})
        if not self.due(step):
            return
        if not loss.isfinite():  # waits for the device
            raise ValueError(
                f"the loss of step {step} is {float(loss)}: lower optimizer.learning_rate or "
                f"l2e.{self.config.l2e.strength}"
            )
        seconds = (time.monotonic() - self.since) / len(self.pending)
        for row in self.pending:
            row["step_seconds"] = seconds
        layers = {name.split(".")[2]: values for name, values in handle.metrics().items()}
        self.pending[-1]["l2e"] = layers
        if not look_due(self.config, step):
            self.write(step, {})

    def write(self, step: int, found: dict[str, Any]) -> None:
        """Write what is pending, and what was found of the model after `step`."""
        self.pending[-1] |= found
        for row in self.pending:
            self.file.write(row)
        self.pending = []


def begin(
    config: Config, folder: Path, corpus: data.Corpus, done: int, device: torch.device
) -> None:
    """Configuration and manifest; metrics after the state that is gone on from are set aside."""
    for line in set_aside(folder, done if done else -1):
        print(line, flush=True)
    write_text(folder / CONFIG, config.model_dump_json(indent=2) + "\n")
    told = {"hardware": describe(device), "data": corpus.describe()}
    write_json(folder / MANIFEST, circumstances() | told)


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, handle: l2e.Handle
) -> None:
    """Everything that training goes on from, in the place of what was there."""
    state = {"step": step, "model": model.state_dict(), "l2e": handle.state_dict()}
    torch.save(state | {"optimizer": optimizer.state_dict()}, folder / f"{STATE}.tmp")
    (folder / f"{STATE}.tmp").replace(folder / STATE)


def resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, handle: l2e.Handle
) -> int:
    """Take up what `save` wrote, if it did; the steps done."""
    if not (folder / STATE).exists():
        return 0
    state = torch.load(folder / STATE, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    handle.load_state_dict(state["l2e"])
    print(f"resumed at step {state['step']}", flush=True)
    return state["step"]


if __name__ == "__main__":
    cli.run_verb(main)
