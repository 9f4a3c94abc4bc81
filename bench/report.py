"""docs/benchmarks.md, from the JSON files of the machines measured so far."""

from __future__ import annotations

import json
from pathlib import Path

PREFACE = """# Benchmarks

Written by `make bench` (`python bench/run.py`) from the JSON files in `bench/results/`; do not
edit. Contenders take turns round by round, in both orders; numbers are medians, brackets hold
95 % bootstrap intervals. A step is forward, backward and update, all with torch's fused AdamW.
FLOPs a token are 6 x matmul parameters (the output embedding included) + 12 x layers x hidden x
length; the peak is the best of a few large matrix products on the same machine. On a CPU with
one thread, a step's time is the time its thread ran, so that other programs hardly count; there
all contenders keep freed memory, as the trainer asks of malloc (from 26 November 2026 on), and
compiled ones are in their steady state.
"""

WITHOUT_GPU = """## On a GPU

Not in these tables yet. `python bench/gpu.py` checks one GPU and measures on it, most important
first, in less than ten minutes; [gpu](gpu.md) has what it found, and what its numbers mean.
"""


def write_report(results: Path, path: Path) -> None:
    """Write the tables of every `results/*.json` to `path`."""
    parts = [PREFACE]
    for file in sorted(results.glob("*.json")):
        parts += machine_sections(json.loads(file.read_text()))
    parts += [
        attached(json.loads(file.read_text())) for file in sorted(results.glob("attach/*.json"))
    ]
    if not (results / "cuda.json").exists():
        parts.append(WITHOUT_GPU)
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(parts))


def machine_sections(results: dict) -> list[str]:
    """One machine's tables."""
    machine = results["machine"]
    commands = "; ".join(f"bench/run.py {options}" for options in results["commands"].values())
    parts = [
        f"## {machine['name']}\n\n{machine['date']}, `{commands}`, {machine['cores']} "
        f"cores, {machine['threads']} thread(s) a process, Python {machine['python']}, "
        f"{versions(machine)}.\n{machine.get('note', '')}\n"
    ]
    parts += [training(result) for result in results.get("train", [])]
    if "layer" in results:
        parts.append(layer(results["layer"]))
    if "loading" in results:
        parts.append(loading(results["loading"]))
    if "scaling" in results:
        parts.append(scaling(results["scaling"], machine["cores"]))
    return parts


def training(result: dict) -> str:
    """Every contender's step on one shape."""
    rows = [
        [
            name,
            interval(seconds, 3),
            f"{result['tokens_per_second'][name]:,.0f}",
            f"{result['share_of_peak'][name]:.1%}",
            interval(result["added_percent"][name], 2) if name in result["added_percent"] else "",
        ]
        for name, seconds in result["seconds_a_step"].items()
    ]
    header = ["contender", "seconds a step", "tokens/s", "share of peak", "added by L2E, %"]
    absent = [f"Not measured: {name} ({reason})." for name, reason in result["absent"].items()]
    return "\n".join(
        [
            f"### Training Pythia {result['preset']}, {result['dtype']}, {result['batch_size']} x "
            f"{result['sequence_length']} tokens, {result['rounds']} rounds\n",
            table(header, rows),
            f"Times as fast as a peer: {speed_over_peers(result)}. Measured matrix peak: "
            f"{result['measured_peak_tflops']:.3g} TFLOP/s.",
            *pairs(result),
            *absent,
            "",
        ]
    )


def speed_over_peers(result: dict) -> str:
    """Of ours, eager and compiled; results of older programs have the fastest peer alone."""
    known = {"ours": {result["fastest_peer"]: result["ours_over_fastest_peer"]}}
    return "; ".join(
        f"{ours} over {peer} {interval(value, 2)}"
        for ours, peers in result.get("speed_over_peers", known).items()
        for peer, value in peers.items()
    )


def pairs(result: dict) -> list[str]:
    """What L2E adds by further rounds of two contenders alone."""
    if not result.get("pairs", {}).get("rounds"):
        return []
    added = interval(result["pairs"]["added_percent"], 2)
    return [
        f"In {result['pairs']['rounds']} further rounds of ours and ours + l2e mid2 alone, the "
        f"latter takes {added} % longer."
    ]


def layer(rows: list[dict]) -> str:
    """The layer alone, by number of neurons."""
    names = [name for name in rows[0] if name not in ("neurons", "dtype")]
    body = [
        [str(row["neurons"]), row["dtype"], *(interval(row[name], 2) for name in names)]
        for row in rows
    ]
    return (
        "### The layer alone: nanoseconds an activation, forward and backward\n\n"
        + table(["neurons", "dtype", *names], body)
        + "\n"
    )


def loading(result: dict) -> str:
    """Batches a second, in tokens."""
    return (
        "### Reading batches\n\n32 x 2049 tokens at a time, one process, from "
        f"{result['tokens_in_file'] / 1e6:.0f} million tokens in gpt-neox's order: "
        f"{interval(result['tokens_per_second'], 0)} tokens/s; "
        f"{1000 * result['seconds_to_open']:.1f} ms to open and shuffle.\n"
    )


def scaling(rows: list[dict], cores: int) -> str:
    """The trainer on more processes."""
    one = rows[0]["tokens_per_second"]["median"]
    body = [
        [
            str(row["processes"]),
            interval(row["tokens_per_second"], 0),
            f"{row['tokens_per_second']['median'] / one:.2f} x",
        ]
        for row in rows
    ]
    return (
        f"### The whole trainer on several processes ({cores} cores)\n\nPythia 14m, fp32, 16 x 256 "
        "tokens a step, ZeRO-1, L2E on, one thread a process, wall-clock time.\n\n"
        + table(["processes", "tokens/s", "against one"], body)
        + "\n"
    )


def attached(result: dict) -> str:
    """`l2e.attach` in somebody else's model."""
    machine, added = result["machine"], result["added"]
    body = [
        [name, interval(milliseconds, 1), interval(added[name], 1) if name in added else ""]
        for name, milliseconds in result["milliseconds"].items()
    ]
    return (
        f"## l2e.attach in somebody else's model: {machine['name']}\n\n{machine['date']}, "
        f"`bench/attach_speed.py --rounds {result['rounds']}`, {machine['cores']} cores, one "
        f"thread, {versions(machine)}. Linear 256 -> 4096, GELU, Linear 4096 -> 256, fp32, "
        f"2,048 rows a step, attached behind the GELU and past the late start. "
        f"{machine['note']}\n\n" + table(["method", "milliseconds a step", "added, %"], body)
    )


def versions(machine: dict) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items() if version
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(value: dict[str, float], digits: int) -> str:
    """A median with its 95 % interval."""
    median, low, high = (f"{value[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"
