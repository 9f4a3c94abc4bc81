"""What the Triton kernels become on GPUs that are not here: registers, spills, instructions, bytes.

Every variant is compiled ahead of time for A100, H100 and B200 by the tools that Triton's package
brings; nothing is run. An H100 or H200 reads and writes an activation of bf16 (4 bytes forward, 6
backward) in the time of about 28 and 42 instructions: what takes more is bound by instructions.

    python bench/aot.py
    python bench/aot.py --output aot.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l2e import triton_kernels
from model import triton_loss
from model.config import ModelConfig, padded_vocab_size
from model.loss import CHUNK_BYTES

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Sequences of a micro-batch, and their tokens.
SHAPES = {"70m": (32, 2048), "410m": (16, 2048), "2.8b": (4, 2048)}
# What is compiled for the other dtypes too.
TYPICAL = {"forward gelu regularize", "backward gelu regularize", "measure gelu"}
# Arguments of the dtype of the activations or logits, and the other numbers; the rest is float32.
STORED = {"pre_pointer", "bias_pointer", "gradient_pointer", "out_pointer", "logits_pointer"}
INTEGERS = {"tokens", "neurons", "program_tokens", "rows", "vocabulary", "first_row"}
POINTERS_TO = {"counts_pointer": "*i32", "labels_pointer": "*i64"}
# Multiples of 16 in every real shape; Triton then knows that 16 bytes can be moved at once.
DIVISIBLE = {"tokens", "neurons", "rows"}


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop of a kernel."""

    instructions: list[str]

    def moved(self, kind: str) -> int:
        """Bytes a thread loads ("LDG") or stores ("STG") in one turn."""
        found = (re.search(rf"\b{kind}\.E(?:\.\w+)*", text) for text in self.instructions)
        return sum(_width(match.group()) for match in found if match)


@dataclass(frozen=True)
class Compiled:
    """One kernel on one kind of GPU.

    Attributes:
        registers, stack: of a thread; bytes of stack.
        spills: instructions that move registers to memory and back.
        loops: innermost or not, in order.
    """

    registers: int
    stack: int
    spills: int
    loops: list[Loop]

    @property
    def longest_loop(self) -> Loop:
        return max(self.loops, key=lambda loop: len(loop.instructions))

    def costs(self, unit: str, units: int) -> dict[str, Any]:
        """The columns of a line of the table; of the longest loop, which does so many units."""
        loop = self.longest_loop
        return {
            "registers": self.registers,
            "spills": self.spills,
            "stack": self.stack,
            f"instructions_per_{unit}": round(len(loop.instructions) / units, 1),
            f"bytes_per_{unit}": (loop.moved("LDG") + loop.moved("STG")) / units,
        }


def compile_for(
    target: str, kernel: Any, dtype: str, options: dict[str, int], **constants: object
) -> Compiled:
    """Compile `kernel` for tensors of `dtype`, with Triton's `options`."""
    names = kernel.arg_names
    signature = {name: _type(name, dtype) for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = [
        name
        for name in names
        if name not in constants and (name.endswith("_pointer") or name in DIVISIBLE)
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    gpu = GPUTarget("cuda", TARGETS[target], 32)
    binary = triton.compile(source, target=gpu, options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (_dump(option, file.name) for option in ("resource-usage", "sass"))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Compiled(int(registers), int(stack), spills, list(_loops(code)))


def _type(name: str, dtype: str) -> str:
    if name in POINTERS_TO:
        return POINTERS_TO[name]
    if name in INTEGERS:
        return "i32"
    if name in STORED:
        return f"*{dtype}"
    return "*fp32" if name.endswith("_pointer") else "fp32"


def _dump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), f"--dump-{option}", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(code: str) -> Iterator[Loop]:
    """What lies between a branch backwards and its target."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in lines]
    for address, text in instructions:
        branch = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < address:
            first = int(branch.group(1), 16)
            yield Loop([text for at, text in instructions if first <= at <= address])


def _width(instruction: str) -> int:
    """Bytes that one load or store of a thread moves."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for name, size in sizes.items() if name in instruction.split(".")), 4)


def layer_variants(dtype: str) -> Iterator[tuple[str, Any, dict[str, object]]]:
    """(name, kernel, constants) of every variant that training launches."""
    for activation in ("gelu", "gelu_tanh", None):
        common: dict[str, object] = {"ACTIVATION": activation, "EVEN": True}
        common |= {"BIASED": activation is not None, **triton_kernels.tiles(BYTES[dtype])}
        title = activation or "identity"
        for method in ("regularize", "deactivate", "none"):
            chosen = common | {"METHOD": method, "SELECTING": True, "SUMMING": True}
            yield f"forward {title} {method}", triton_kernels.forward_kernel, chosen
            for balanced in (False, True) if method == "regularize" else (False,):
                chosen = common | {"METHOD": method, "BALANCED": balanced, "SQUARES": False}
                name = f"backward {title} {method}{' scale_invariant' if balanced else ''}"
                yield name, triton_kernels.backward_kernel, chosen
                if method == "regularize":
                    compared = chosen | {"SQUARES": True}
                    yield f"{name} compared", triton_kernels.backward_kernel, compared
        observing = common | {"METHOD": "regularize", "SELECTING": False, "SUMMING": True}
        yield f"forward {title} before selection", triton_kernels.forward_kernel, observing
        again = common | {"METHOD": "regularize", "SELECTING": True, "SUMMING": False}
        yield f"forward {title} recomputed", triton_kernels.forward_kernel, again
        yield f"measure {title}", triton_kernels.measure_kernel, common


def layer_row(target: str, dtype: str, name: str, kernel: Any, constants: dict) -> dict:
    """One line of the table."""
    registers = triton_kernels.most_registers(comparing=bool(constants.get("SQUARES")))
    options = {"num_warps": triton_kernels.WARPS, "maxnreg": registers}
    compiled = compile_for(target, kernel, dtype, options, **constants)
    loop = compiled.longest_loop
    activations = (loop.moved("STG") or loop.moved("LDG")) // BYTES[dtype]
    return {
        "name": name,
        "target": target,
        "dtype": dtype,
        **compiled.costs("activation", activations),
        "widest": "128" if any(".128" in text for text in loop.instructions) else "less",
    }


def loss_rows(target: str, dtype: str) -> list[dict]:
    """The two passes of the softmax over a chunk of logits."""
    rows = []
    for name, kernel in (
        ("softmax normaliser", triton_loss.normaliser_kernel),
        ("softmax gradient", triton_loss.gradient_kernel),
    ):
        constants = {"BLOCK": triton_loss.BLOCK}
        options = {"num_warps": triton_loss.WARPS}
        compiled = compile_for(target, kernel, dtype, options, **constants)
        logits = compiled.longest_loop.moved("LDG") // BYTES[dtype]
        place = {"name": name, "target": target, "dtype": dtype}
        rows.append(place | compiled.costs("logit", logits))
    return rows


def weight_gradient_bytes(preset: str) -> float:
    """Bytes a logit for adding up the output embedding's gradient in float32 over the chunks.

    The first chunk's product writes it; each other one's is written, and read and added to it.
    """
    config, (batch, length) = ModelConfig.model_validate({"preset": preset}), SHAPES[preset]
    chunk = CHUNK_BYTES["cuda"] // (BYTES["bf16"] * padded_vocab_size(config.vocab_size))
    chunks = math.ceil(batch * length / chunk)
    return (4 + (chunks - 1) * 16) * config.hidden_size / (batch * length)


def measure() -> dict:
    """For every target: all variants in bf16, the default's in all dtypes. What --output writes."""
    variants = [
        (target, dtype, *variant)
        for target in TARGETS
        for dtype in BYTES
        for variant in layer_variants(dtype)
        if dtype == "bf16" or variant[0] in TYPICAL
    ]
    kernels = [layer_row(*variant) for variant in variants]
    losses = [row for target in TARGETS for dtype in BYTES for row in loss_rows(target, dtype)]

    def bytes_of(name: str) -> float:
        found = (r for r in kernels if r["name"] == name and _is_typical(r))
        return next(found)["bytes_per_activation"]

    softmax = sum(row["bytes_per_logit"] for row in losses if _is_typical(row))
    added = {preset: round(weight_gradient_bytes(preset), 2) for preset in SHAPES}
    return {
        "kernels": kernels,
        "loss": {
            "bytes_per_logit": softmax + max(added.values()),
            "softmax": softmax,
            "weight_gradient": added,
            "kernels": losses,
        },
        "layer": {
            "bytes_per_activation": {
                "forward": bytes_of("forward gelu regularize"),
                "backward": bytes_of("backward gelu regularize"),
            }
        },
        "triton": triton.__version__,
    }


def _is_typical(row: dict) -> bool:
    return (row["target"], row["dtype"]) == ("sm_90", "bf16")


def print_table(found: dict) -> None:
    """The same for people."""
    head = f"{'kernel':44} {'target':7} {'dtype':5} registers spills stack instructions  bytes"
    print(head)
    for row in found["kernels"] + found["loss"]["kernels"]:
        unit = "activation" if "instructions_per_activation" in row else "logit"
        print(
            f"{row['name']:44} {row['target']:7} {row['dtype']:5} {row['registers']:9} "
            f"{row['spills']:6} {row['stack']:5} {row[f'instructions_per_{unit}']:12} "
            f"{row[f'bytes_per_{unit}']:6.1f}"
        )
    loss = found["loss"]
    print(
        f"\nbf16 on sm_90, bytes: an activation {found['layer']['bytes_per_activation']}; a logit "
        f"{loss['softmax']:.0f} in the softmax and {loss['weight_gradient']} in the weight's "
        f"gradient, beside the matrix products"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    arguments = parser.parse_args()
    found = measure()
    print_table(found)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
