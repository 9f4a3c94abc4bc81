"""`experiment.py --dry-run`: what an experiment will take, and what it can find."""

from __future__ import annotations

from launch.comparison import statistics
from launch.comparison.plan import Experiment, checkpoint_bytes, not_alike, tokens
from launch.planning.cost import flops_per_token, parameters

# Of one core, as a model of 2 M parameters reaches them on an AMD EPYC.
CORE_FLOPS = 6e10


def lines(experiment: Experiment, workers: int) -> list[str]:
    """Runs, tokens, time and the detectable difference, in words."""
    plan, runs = experiment.plan, experiment.runs
    told = [f"question   {plan.question}", f"plan       sha256 {experiment.hash[:16]}"]
    for arm in plan.arms:
        seeds = experiment.seeds_of(arm)
        what = "; ".join(f"{key} = {value}" for key, value in arm.overrides.items()) or "as it is"
        told.append(f"arm        {arm.name}: {len(seeds)} seeds, {what}")
        if arm.control_for:
            told.append(f"             rules out: {arm.control_for}")
    left = [run for run in runs if not run.finished]
    total = sum(tokens(run) for run in left)
    work = sum(
        tokens(run) * flops_per_token(run.config.model, run.config.data.sequence_length)
        for run in left
    )
    hours = work / CORE_FLOPS / 3600 / workers
    disk = sum(checkpoint_bytes(run) for run in left) / 1e9
    if experiment.program is not None:
        told.append(
            f"program    {experiment.program}; parameters and time below are those of a GPT-NeoX "
            "of its configuration"
        )
    told += [
        f"runs       {len(runs)}, {len(runs) - len(left)} finished, of "
        f"{parameters(runs[0].config.model):,} parameters and {tokens(runs[0]):,} tokens each",
        f"tokens     {total / 1e6:,.1f} M to go, {disk:.1f} GB of checkpoints",
        f"time       about {hours:.1f} hours with {workers} workers, if each has a core that "
        f"sustains {CORE_FLOPS / 1e9:.0f} GFLOP/s; a GPU is another matter",
    ]
    told += [f"not alike  {line}" for line in not_alike(experiment)]
    return told + findable(experiment)


def findable(experiment: Experiment) -> list[str]:
    """What the primary comparison can find with its seeds."""
    plan = experiment.plan
    arms = {arm.name: set(experiment.seeds_of(arm)) for arm in plan.arms}
    seeds = len(arms[plan.primary.arm] & arms[plan.primary.against])
    what = (
        f"{plan.primary.arm} - {plan.primary.against} in {plan.primary.readout}, {seeds} seeds; "
        f"{plan.smallest_difference:g} matters"
    )
    if plan.deviation is None:
        return [f"primary    {what}", "finds      unknown: the plan states no deviation"]
    found = statistics.detectable(plan.deviation, seeds)
    if found is None:
        return [f"primary    {what}", "finds      nothing: one seed has no interval"]
    enough = "enough" if found <= plan.smallest_difference else "TOO FEW seeds"
    return [
        f"primary    {what}",
        f"finds      a difference of {found:.4f} with 80 % probability, if paired differences "
        f"deviate by {plan.deviation:g}: {enough}",
    ]
