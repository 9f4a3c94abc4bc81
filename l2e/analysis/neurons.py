"""Neurons by name."""

import re


def parse_neuron(text: str) -> tuple[int, int]:
    """(layer, neuron) of a name such as L3.N609."""
    match = re.fullmatch(r"L(\d+)\.N(\d+)", text.strip())
    if not match:
        raise ValueError(f"neuron {text!r}: write layer and neuron as in L3.N609")
    return int(match[1]), int(match[2])


def neuron_name(layer: int, neuron: int) -> str:
    return f"L{layer}.N{neuron}"
