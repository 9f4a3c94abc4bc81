"""In what arms are alike: what trains the same, and what cannot be held against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from configs import Config
from l2e import select_layers

# Sections and keys on which no number of training depends.
BESIDE_TRAINING = ("evaluate", "logging", "checkpoint", "monitor")
BESIDE_TRAINING_KEYS = {
    "data": ("cache_dir", "validation_path"),
    "parallel": ("processes", "join_timeout", "step_timeout"),
}


def trained_alike(config: Config) -> str:
    """What runs of one seed train the same by, as a text."""
    told = config.model_dump(mode="json")
    told["l2e"] = acting = config.l2e.acting()
    if acting:
        acting["layers"] = select_layers(config.l2e.layers, config.model.num_layers)
    if told["schedule"]["decay_steps"] is None:
        told["schedule"]["decay_steps"] = config.train.steps
    for section in BESIDE_TRAINING:
        del told[section]
    for section, keys in BESIDE_TRAINING_KEYS.items():
        for name in keys:
            del told[section][name]
    return json.dumps(told, sort_keys=True)


def flat_configuration(config: Config) -> dict[str, Any]:
    """Each key by its dotted name."""
    return dict(flat(json.loads(config.model_dump_json())))


def flat(content: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything inside."""
    for key, value in content.items():
        path = f"{name}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from flat(value, path)
        else:
            yield path, value


def unlike(arms: dict[str, dict[str, Any]]) -> list[str]:
    """What sets the losses of arms apart that is no matter of training, in words.

    arms: of each the configuration of a run, flat.
    """
    told = []
    tokens = {
        arm: one["train.steps"] * one["train.global_batch_size"] * one["data.sequence_length"]
        for arm, one in arms.items()
    }
    if len(set(tokens.values())) > 1:
        each = ", ".join(f"{arm} {count:,}" for arm, count in tokens.items())
        told.append(f"tokens differ: {each}; each is compared at its own last step")
    validation = {arm: tuple(validated_on(one).items()) for arm, one in arms.items()}
    if len(set(validation.values())) > 1:
        each = "; ".join(
            f"{arm} {', '.join(f'{name} {value}' for name, value in one)}"
            for arm, one in validation.items()
        )
        told.append(f"the validation losses are over other samples: {each}")
    return told


def validated_on(configuration: dict[str, Any]) -> dict[str, Any]:
    """What the samples of the validation loss follow from."""
    path = configuration["data.validation_path"]
    held_out = "data.validation_fraction" if path is None else "data.validation_path"
    batches = configuration["evaluate.batches"] * configuration["train.global_batch_size"]
    names = (held_out, "data.sequence_length")
    return {name: configuration[name] for name in names} | {"samples": batches}
