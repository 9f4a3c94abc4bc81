"""`--dry-run`: the resolved plan of a run, from its configuration alone, without a GPU."""

from __future__ import annotations

from configs import Config
from configs.checks import BUILTIN, is_hub
from l2e import select_layers
from launch.planning import cost
from launch.planning.layouts import layout_of

GIB = 2**30


def plan_lines(config: Config) -> list[str]:
    """What the run will do, in words and numbers."""
    model, train, l2e = config.model, config.train, config.l2e
    layout = layout_of(config, config.parallel.processes or 1)
    tokens = train.steps * layout.step_tokens
    flops = cost.flops_per_token(model, config.data.sequence_length)
    inhibited = select_layers(l2e.layers, model.num_layers)
    peak = cost.peak_memory(model, layout)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in peak.items() if size)
    return [
        f"model      {model.num_layers} blocks x {model.hidden_size}, {model.num_attention_heads} "
        f"heads: {cost.parameters(model):,} parameters",
        f"l2e        {l2e.method} by {l2e.selection} in blocks {', '.join(map(str, inhibited))}: "
        f"{l2e.inhibit_fraction:.2%} of activations, weight {l2e.weight}, from step "
        f"{l2e.late_start_step}",
        f"data       {describe_source(config)}, order {config.data.order}",
        f"layout     {layout.ranks} processes = {layout.tensor} tensor x {layout.pipeline} "
        f"pipeline x {layout.data} data parallel, ZeRO-{layout.zero_stage}, {layout.dtype}",
        f"batch      {train.global_batch_size} sequences x {layout.sequence_length} tokens = "
        f"{layout.micro_batch_size} a micro-batch x {layout.accumulation} accumulated x "
        f"{layout.data} ranks",
        f"length     {train.steps:,} steps = {tokens / 1e9:.3g} B tokens, "
        f"{tokens * flops:.3g} FLOPs ({flops / 1e9:.3g} GFLOP a token)",
        f"rate       {config.optimizer.type} at {config.optimizer.learning_rate:g}, "
        f"{config.schedule.type}, {config.schedule.warmup_steps} steps of warm-up",
        f"memory     {sum(peak.values()) / GIB:.1f} GiB a process (GiB: {parts})",
    ]


def describe_source(config: Config) -> str:
    """Where the tokens come from, in words."""
    if config.data.path == BUILTIN:
        return "built from Python's standard library at the start"
    if is_hub(config.data.path):
        return f"{config.data.path}, fetched from the hub at the start"
    return str(config.data.path)


def print_plan(config: Config) -> None:
    """Print the plan; everything that can be checked has been by now."""
    print("\n".join(plan_lines(config)))
    print("dry run: the configuration is valid; nothing was started")
