"""Take a checkpoint to Hugging Face's form, from it, or to another layout.

    python launch/export.py to-hf --checkpoint runs/demo --output demo_hf
    python launch/export.py from-hf --model EleutherAI/pythia-70m@step13000 \\
        --output pythia-70m
    python launch/pretrain.py --config configs/70m.json --resume pythia-70m
    python launch/export.py reshard --checkpoint runs/demo --tensor 2 --pipeline 1 --output demo_tp2
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.cli import named, path, run_verb, verb_parser, whole


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.verb(options)


def to_hf(options: argparse.Namespace) -> None:
    from launch.checkpoint.huggingface import to_huggingface
    from launch.checkpoint.stored import open_checkpoint
    from launch.engine.groups import single_process
    from launch.engine.hardware import TORCH_DTYPES
    from launch.planning.cost import parameters

    source = open_checkpoint(options.checkpoint)
    with single_process():
        difference = to_huggingface(
            source, options.output, TORCH_DTYPES[options.dtype], not options.no_tokenizer
        )
    if source.tokenizer is None and not options.no_tokenizer:
        print(f"{source.folder} has no tokenizer: none was written")
    print(
        f"{options.output}: {source.folder.name}, {parameters(source.model_config):,} "
        f"parameters in {options.dtype}; its logits on real text are the model's to "
        f"{difference:.1e} of the largest"
    )


def from_hf(options: argparse.Namespace) -> None:
    from launch.checkpoint.huggingface import from_huggingface
    from launch.checkpoint.stored import StoredCheckpoint
    from launch.planning.cost import parameters

    from_huggingface(options.model, options.output)
    config = StoredCheckpoint(options.output).model_config
    print(
        f"{options.output}: {parameters(config):,} parameters from {options.model}. Train on "
        f"with a configuration whose model section is that of {options.output}/config.json and "
        f"`--resume {options.output}`"
    )


def reshard(options: argparse.Namespace) -> None:
    from launch.checkpoint.huggingface import reshard as copy
    from launch.checkpoint.stored import open_checkpoint

    source = open_checkpoint(options.checkpoint)
    copy(source, options.output, options.tensor, options.pipeline)
    print(
        f"{options.output}: {source.folder.name} for tensor {options.tensor}, pipeline "
        f"{options.pipeline}. Tensors are stored whole, so `--resume` under another layout "
        "also works without this"
    )


def parser() -> argparse.ArgumentParser:
    result = verb_parser(__doc__, prog="export.py")
    verbs: Any = result.add_subparsers(required=True, metavar="to-hf | from-hf | reshard")

    verb = verbs.add_parser("to-hf", help="write config, safetensors and tokenizer")
    verb.set_defaults(verb=to_hf)
    add_checkpoint(verb)
    verb.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the written weights",
    )

    verb.add_argument(
        "--no-tokenizer", action="store_true", help="write the weights alone, for another tokenizer"
    )

    verb = verbs.add_parser("from-hf", help="make a checkpoint to resume from")
    verb.set_defaults(verb=from_hf)
    verb.add_argument(
        "--model",
        type=named,
        required=True,
        metavar="DIR_OR_ID",
        help="folder of a GPT-NeoX model, or owner/name@revision on the hub",
    )

    verb = verbs.add_parser("reshard", help="copy a checkpoint for another layout")
    verb.set_defaults(verb=reshard)
    add_checkpoint(verb)
    verb.add_argument(
        "--tensor", type=whole(1), required=True, metavar="N", help="tensor-parallel ranks"
    )
    verb.add_argument("--pipeline", type=whole(1), default=1, metavar="N", help="pipeline stages")

    for verb in verbs.choices.values():
        verb.add_argument("--output", type=path, required=True, metavar="DIR", help="a new folder")
    return result


def add_checkpoint(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--checkpoint",
        type=named,
        required=True,
        metavar="DIR",
        help="a checkpoint's folder, or a run's for its latest",
    )


if __name__ == "__main__":
    run_verb(main)
