"""Training speed on this machine: our model against `transformers`, and L2E on against off.

One process, one Pythia shape, the same tokens and the same torch AdamW for every contender;
whole steps (forward, backward, update), taking turns so that drift hits all alike.

    python bench/train_speed.py --dtype bf16 --rounds 15 --output train_speed.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state

from bench.timing import added, estimate, interleave
from l2e import Controller, L2EConfig, Sharding
from l2e.layer import L2ELayer
from model.config import ModelConfig
from model.gpt_neox import GPTNeoX
from model.huggingface import hugging_face_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Regularising from the second step on, so that every timed step does the whole work.
L2E = {"method": "regularize", "late_start_step": 1}

Step = Callable[[], object]


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(preset=arguments.preset)
    with one_process(device), device:
        steps = contenders(config, arguments, DTYPES[arguments.dtype])
        taken = interleave(steps, arguments.rounds)
    result = {
        "arguments": vars(arguments),
        "machine": {"device": device_name(device), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
    } | summary(taken, arguments.batch_size * arguments.sequence_length)
    print_table(result)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="14m", help="Pythia size")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of weights and activations"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """The process group of one rank that the model's tensor-parallel layers ask for."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def contenders(
    config: ModelConfig, arguments: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Step]:
    sample = torch.randint(config.vocab_size, (arguments.batch_size, arguments.sequence_length + 1))
    return {
        "transformers": transformers_step(config, sample, dtype),
        "ours": our_step(config, sample, dtype, None),
        "ours + l2e mid2": our_step(config, sample, dtype, L2EConfig(layers="mid2", **L2E)),
        "ours + l2e all": our_step(config, sample, dtype, L2EConfig(layers="all", **L2E)),
    }


def transformers_step(config: ModelConfig, sample: torch.Tensor, dtype: torch.dtype) -> Step:
    """One step of GPTNeoXForCausalLM with scaled-dot-product attention."""
    form = transformers.GPTNeoXConfig.from_dict(hugging_face_config(config))
    form._attn_implementation = "sdpa"
    model = transformers.GPTNeoXForCausalLM(form).to(sample.device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens, labels = sample[:, :-1], sample[:, 1:].contiguous()

    def step() -> None:
        model(input_ids=tokens, labels=labels, shift_labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    config: ModelConfig, sample: torch.Tensor, dtype: torch.dtype, l2e: L2EConfig | None
) -> Step:
    model = GPTNeoX(config, l2e, seed=0).to(sample.device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    layers = [module for module in model.modules() if isinstance(module, L2ELayer)]
    controller = Controller(layers, l2e, Sharding()) if l2e else None
    tokens, labels = sample[:, :-1], sample[:, 1:]

    def step() -> None:
        model(tokens, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller:
            controller.step()

    return step


def summary(taken: dict[str, list[float]], tokens: int) -> dict:
    """Seconds a step, tokens/s, and the two ratios that the goals speak of, with intervals."""
    seconds = {name: estimate(values).as_dict() for name, values in taken.items()}
    rounds = zip(taken["transformers"], taken["ours"], strict=True)
    ratios = [theirs / ours for theirs, ours in rounds]
    return {
        "seconds_a_step": seconds,
        "tokens_per_second": {name: tokens / value["median"] for name, value in seconds.items()},
        "ours_over_transformers": estimate(ratios).as_dict(),
        "l2e_added_percent": {
            name: added(taken, name, "ours").as_dict() for name in taken if "l2e" in name
        },
    }


def print_table(result: dict) -> None:
    print(
        f"{result['machine']['device']}, {result['machine']['threads']} threads, {result['date']}"
    )
    for name, tokens_per_second in result["tokens_per_second"].items():
        seconds = result["seconds_a_step"][name]["median"]
        print(f"  {name:16} {seconds:8.3f} s a step {tokens_per_second:10.0f} tokens/s")
    print(f"ours over transformers: {interval(result['ours_over_transformers'], ' x')}")
    for name, value in result["l2e_added_percent"].items():
        print(f"{name} adds {interval(value, ' %')}")


def interval(value: dict[str, float], unit: str) -> str:
    return f"{value['median']:.2f}{unit} ({value['low']:.2f} .. {value['high']:.2f})"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
