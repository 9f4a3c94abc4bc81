"""How fast the analyses are on a model of Pythia-70M's shape with random weights.

    OMP_NUM_THREADS=2 python bench/analysis_speed.py --output docs/results

NeuroMFA per network against a plain triple loop, a series of checkpoints on disk, ablation of 100
neurons over 12 features, and the monitor's share of a training step. Prints what it finds and
writes analysis_speed.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path[0] = str(Path(__file__).resolve().parents[1])

from l2e.analysis.ablation import AblationOptions, analyze_ablation
from l2e.analysis.features import make_features
from l2e.analysis.interaction import draw_samples, node_counts, open_weights, sampled_network
from l2e.analysis.monitor import Hook, Monitor
from l2e.analysis.multifractal import MIN_KEPT, MOMENTS, spectrum
from l2e.analysis.networks import Network
from l2e.analysis.neuromfa import NeuroMFAOptions, analyze_neuromfa
from l2e.analysis.results import provenance
from l2e.analysis.series import read_series
from launch.engine.hardware import keep_freed_memory

SERIES = 27
PASSAGES, FEATURES, ABLATED_TOKENS = 600, 12, 128
NEURONS, RANDOM = 100, 10
MONITORED_TOKENS = 64


class RandomTokens:
    """Stands in for a tokenizer: every text is so many random ids."""

    def __init__(self, vocabulary: int, length: int):
        self.random = np.random.default_rng(0)
        self.vocabulary, self.length = vocabulary, length

    def encode(self, text: str) -> list[int]:
        return self.random.integers(1, self.vocabulary, self.length).tolist()

    def __call__(self, texts: list[str], **_) -> dict:
        return {"input_ids": [self.encode(text) for text in texts]}


def model_of_70m() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )
    return GPTNeoXForCausalLM(config).eval()


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def triple_loop(counts: np.ndarray) -> list[float]:
    """tau(q) with plain loops over moments, radii and nodes."""
    nodes = [row for row in counts.tolist() if sum(row) > MIN_KEPT]
    radii = [r for r in range(counts.shape[1]) if any(row[r] for row in nodes)]
    shares = []
    for row in nodes:
        reached, total = 1, 1 + sum(row)
        node = []
        for r in radii:
            reached += row[r]
            node.append(reached / total)
        shares.append(node)
    x = np.log(np.array(radii) / radii[-1])
    tau = []
    for q in MOMENTS.tolist():
        logs = []
        for at in range(len(radii)):
            z = 0.0
            for node in shares:
                z += node[at] ** q
            logs.append(np.log(z))
        tau.append(float(np.polyfit(x, logs, 1)[0]))
    return tau


def neuromfa_speed(model: GPTNeoXForCausalLM, folder: Path) -> dict:
    model.save_pretrained(folder / "step0")
    [checkpoint] = map(open_weights, read_series([str(folder / "step0")]))
    samples = draw_samples(checkpoint.architecture, 64, 0)
    counts = node_counts(sampled_network(checkpoint, samples, "per_head"), 150)

    def one_network() -> None:
        spectrum(node_counts(sampled_network(checkpoint, samples, "per_head"), 150))

    slow_tau: list[float] = []
    with threadpool_limits(1):  # as many as the loop has
        one_network()
        fast = np.median([timed(one_network)[1] for _ in range(20)])
        vectorised = np.median([timed(lambda: spectrum(counts))[1] for _ in range(20)])
        slow = timed(lambda: slow_tau.extend(triple_loop(counts)))[1]
    difference = np.abs(np.array(slow_tau) - spectrum(counts).tau).max()
    for step in range(1, SERIES):
        (folder / f"step{step}").symlink_to(folder / "step0")
    names = [str(folder / f"step{step}") for step in range(SERIES)]
    series = [open_weights(checkpoint) for checkpoint in read_series(names)]
    wall, cpu = timed(lambda: analyze_neuromfa(series, NeuroMFAOptions(), progress=False))
    return {
        "seconds_per_network": float(fast),
        "triple_loop_seconds": slow,
        "vectorised_seconds": float(vectorised),
        "times_faster_than_triple_loop": slow / float(vectorised),
        "largest_difference_of_tau": float(difference),
        "series_of_27_with_all_controls_seconds": {"wall": wall, "cpu": cpu},
    }


def ablation_speed(model: GPTNeoXForCausalLM) -> dict:
    """Ablation of NEURONS spread evenly over the layers, and RANDOM random ones beside them."""
    network = Network(model, RandomTokens(50304, ABLATED_TOKENS), "70m")  # type: ignore[arg-type]
    texts = [str(i) for i in range(PASSAGES)]
    features = make_features("x", texts, [f"f{i % FEATURES}" for i in range(PASSAGES)])
    chosen = [(i % 6, 7 * i) for i in range(NEURONS)]
    result: dict = {}
    options = AblationOptions(random=RANDOM)
    wall, cpu = timed(
        lambda: result.update(analyze_ablation(network, features, chosen, options, progress=False))
    )
    return {
        "neurons": NEURONS,
        "random_neurons": RANDOM,
        "passages": PASSAGES,
        "tokens_a_passage": ABLATED_TOKENS,
        "exact_passages_a_feature": result["exact_passages"],
        "first_order_correlation": result["first_order_correlation"],
        "threads": torch.get_num_threads(),
        "seconds": {"wall": wall, "cpu": cpu},
    }


def monitor_speed(model: GPTNeoXForCausalLM) -> dict:
    """The monitor's seconds at its default interval over those of the training steps between."""
    texts = [str(i) for i in range(8 * FEATURES)]
    features = make_features("x", texts, [f"f{i % FEATURES}" for i in range(len(texts))])
    tokenizer = RandomTokens(50304, MONITORED_TOKENS)
    monitor = Monitor(features, tokenizer, batch_size=8, max_tokens=MONITORED_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 50304, (4, 512))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def observe(tokens: torch.Tensor, hook: Hook) -> None:
        handles = [
            block.get_submodule("mlp.act").register_forward_hook(
                lambda _, __, z, name=str(i): hook(name, z)
            )
            for i, block in enumerate(model.gpt_neox.layers)
        ]
        model(tokens)
        for handle in handles:
            handle.remove()

    step()
    steps = [timed(step) for _ in range(3)]
    runs = [timed(lambda: monitor.run(observe)) for _ in range(3)]
    interval = monitor.interval(tokens.numel())
    share = min(cpu for _, cpu in runs) / (interval * min(cpu for _, cpu in steps))
    return {
        "tokens_per_step": tokens.numel(),
        "monitor_tokens": monitor.tokens.numel(),
        "interval_steps": interval,
        "step_cpu_seconds": min(cpu for _, cpu in steps),
        "run_cpu_seconds": min(cpu for _, cpu in runs),
        "share_of_training_time": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("."))
    options = parser.parse_args()
    keep_freed_memory()  # as launch/analyze.py does
    model = model_of_70m()
    with tempfile.TemporaryDirectory() as folder:
        found: dict = {"neuromfa": neuromfa_speed(model, Path(folder))}
    print(json.dumps(found["neuromfa"], indent=1))
    found["ablation"] = ablation_speed(model)
    print(json.dumps(found["ablation"], indent=1))
    found["monitor"] = monitor_speed(model)
    print(json.dumps(found["monitor"], indent=1))
    found["provenance"] = provenance()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "analysis_speed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
