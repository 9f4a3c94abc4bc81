"""What a run will do, in words and numbers, from its configuration alone: needs no GPU."""

from __future__ import annotations

from configs import Config
from configs.checks import BUILTIN
from data.dataset import readings
from l2e import L2EConfig, select_layers
from l2e.hub import is_hub
from l2e.memory import GIB
from launch.planning import cost
from launch.planning.cost import LayoutPlan
from launch.planning.layouts import layout_of


def summary(config: Config, layout: LayoutPlan) -> str:
    """The resolved plan of a run in this layout, a line a subject."""
    model, train = config.model, config.train
    tokens = train.steps * layout.step_tokens
    flops = cost.flops_per_token(model, config.data.sequence_length)
    inhibited = ", ".join(map(str, select_layers(config.l2e.layers, model.num_layers)))
    lines = [
        f"model      {model.num_layers} blocks x {model.hidden_size}, {model.num_attention_heads} "
        f"heads: {cost.parameters(model):,} parameters",
        f"l2e        {describe_method(config.l2e)}, in blocks {inhibited}, from step "
        f"{config.l2e.late_start_step}",
        f"data       {describe_source(config)}; order {config.data.order}",
        f"layout     {layout.ranks} processes = {layout.tensor} tensor x {layout.pipeline} "
        f"pipeline x {layout.data} data parallel, ZeRO-{layout.zero_stage}, {layout.dtype}",
        f"batch      {train.global_batch_size:,} sequences x {layout.sequence_length:,} tokens = "
        f"{layout.micro_batch_size} a micro-batch x {layout.accumulation} accumulated x "
        f"{layout.data} ranks",
        f"length     {train.steps:,} steps = {tokens / 1e9:.4g} billion tokens, "
        f"{tokens * flops:.3g} FLOPs ({flops / 1e9:.3f} GFLOP a token = 6 x matmul parameters + "
        "12 x layers x hidden x length)",
        f"rate       {config.optimizer.type} at {config.optimizer.learning_rate:g}, "
        f"{config.schedule.type}, {config.schedule.warmup_steps} steps of warm-up",
    ]
    return "\n".join(lines)


def describe_method(l2e: L2EConfig) -> str:
    """The method in words, with the numbers that it goes by."""
    if l2e.method in ("none", "silence"):
        return l2e.method
    largest = f"the largest {l2e.inhibit_fraction:.2%} of activations, over time"
    if l2e.selection == "topk":
        largest = f"the {l2e.topk} largest activations of each sample"
    if l2e.method != "regularize":
        strength = f"delta {l2e.delta:g}"
    elif l2e.gradient_ratio is not None:
        strength = f"its gradient {l2e.gradient_ratio:g} of the size of the one that arrives"
    else:
        strength = f"weight {l2e.weight:g}"
    return f"{l2e.method} {largest}, {strength}"


def describe_source(config: Config) -> str:
    """Where the tokens come from, in words."""
    if config.data.path == BUILTIN:
        return "built from Python's standard library at the start"
    path, data, train = config.data.path, config.data, config.train
    if path is None or is_hub(path):
        return f"{path}, fetched from the hub at the start"
    split = data.validation_fraction if data.validation_path is None else None
    samples = train.steps * train.global_batch_size
    files = readings(path, data.sequence_length, samples, split)
    return "; ".join(
        f"{prefix}, of whose {tokens:,} tokens the run reads {times:.2%}"
        if times <= 1
        else f"{prefix}, whose {tokens:,} tokens the run reads {times:,.1f} times"
        for prefix, tokens, times in files
    )


def print_plan(config: Config) -> None:
    """`--dry-run`: everything that can be checked has been by now."""
    layout = layout_of(config, config.parallel.processes or 1)
    peak = cost.peak_memory(config.model, layout)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in peak.items() if size)
    print(summary(config, layout))
    print(f"memory     {sum(peak.values()) / GIB:.1f} GiB a process (GiB: {parts})")
