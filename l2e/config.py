"""The settings of the method: one frozen dataclass that explains and checks every key.

Help, unit and bounds stand in each field's metadata, so that a configuration schema elsewhere
can be generated from it and the texts live in one place.
"""

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from l2e.problems import ConfigError, Problem, Settings

LayerChoice = Literal["mid2", "mid_third", "top_bottom", "all"]

DEFAULT_WEIGHT = 0.0003  # of L_MS

BOUNDS = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "gt": ("greater than", lambda value, bound: value > bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


def key(default: Any, help: str, unit: str = "", **bounds: float) -> Any:
    """A configuration key: its default, its help, its unit and its bounds (ge, le, gt, lt)."""
    assert set(bounds) <= set(BOUNDS), bounds
    return field(default=default, metadata={"help": help, "unit": unit, **bounds})


@dataclass(frozen=True)
class L2EConfig(Settings):
    """What is inhibited, where, and how strongly.

    Raises ConfigError, listing every problem at once, when a key's type or value is wrong or
    when two keys contradict each other.
    """

    method: Literal["none", "regularize", "deactivate", "silence"] = key(
        "regularize",
        "none: observe only; regularize: add L_MS to the loss (L2E); deactivate: replace by the "
        "mean (MEmeL); silence: the control, every activation of the layer is 0",
    )
    selection: Literal["threshold", "topk", "random"] = key(
        "threshold",
        "threshold: one moving threshold a layer (L2E); topk: the k largest of each sample "
        "(MEmeL); random: the control, as large a share by chance, at no regard to the MS",
    )
    inhibit_fraction: float = key(
        0.02, "share of all activations above the threshold, over time", gt=0, lt=1
    )
    topk: int = key(1, "activations selected in each sample by topk", unit="activations", ge=1)
    delta: float = key(
        1.0,
        "deactivate: the gradient of a selected activation is multiplied by -delta "
        "(0: naive a, -1: naive b, 1 and more: reversed deactivation)",
        ge=-1000,
        le=1000,
    )
    weight: float | None = key(
        None,
        "weight of L_MS in the loss; default: 0.0003, unless gradient_ratio sets it",
        ge=0,
        le=1e6,
    )
    gradient_ratio: float | None = key(
        None,
        "size of L_MS's gradient to a layer's activations over that of the gradient that arrives "
        "there: sets a weight in each inhibited layer, instead of weight",
        gt=0,
        le=1000,
    )
    layers: LayerChoice | list[int] = key(  # noqa: RUF009
        "mid2", "inhibited blocks: mid2, mid_third, top_bottom, all, or a list of block numbers"
    )
    site: Literal["post", "pre"] = key(
        "post", "activations are taken right after (post) or before (pre) the non-linearity"
    )
    eps: float = key(
        0.01, "share of the layer's mean variance added to each neuron's variance", gt=0, le=1000
    )
    forget_step: int = key(
        100, "batches after which old samples begin to be forgotten", unit="steps", ge=1
    )
    late_start_step: int = key(
        100, "first step that inhibits; before it only statistics are gathered", unit="steps", ge=0
    )
    neuron_axes: Literal["unit", "position"] = key(
        "unit", "unit: a neuron is a hidden unit; position: a (position, hidden unit) pair"
    )
    scale_invariant: bool = key(
        False, "regularize: L_MS of (z - mean)^2 / var, which shrinking a layer cannot lower"
    )
    memel_code_compat: bool = key(
        False,
        "deactivate with topk as MEmeL's published code does it, where that differs from the "
        "paper: score after the statistics update, first batch twice, one selection a sequence",
    )
    kernels: Literal["auto", "plain", "triton"] = key(
        "auto",
        "arithmetic of the layer: plain torch operations; triton: one fused pass on a GPU; auto: "
        "triton on a GPU, and on a CPU one pass in C, compiled at the start, where they agree with "
        "plain, and a line that says which and why",
    )
    threshold_rate: float = key(0.5, "first step size of the moving threshold", gt=0, le=1)
    threshold_rate_floor: float = key(0.02, "its last step size", gt=0, le=1)

    def __post_init__(self) -> None:
        if self.weight is None and self.gradient_ratio is None:
            object.__setattr__(self, "weight", DEFAULT_WEIGHT)  # frozen for everybody else
        hints = get_type_hints(type(self))
        problems = [p for f in fields(self) for p in _problems(f, hints[f.name], self)]
        if not problems:
            problems = list(self._contradictions())
        if problems:
            raise ConfigError("L2EConfig", problems)

    @property
    def strength(self) -> str:
        """The key to lower where L_MS pulls too hard."""
        return "weight" if self.gradient_ratio is None else "gradient_ratio"

    def acting(self) -> dict[str, Any]:
        """The keys that have a say in training, as the others are set; none where nothing is done.

        Settings that act alike train the same.
        """
        if self.method == "none" or (self.method == "regularize" and self.weight == 0):
            return {}
        if self.method == "silence":
            return {"method": self.method, "layers": self.layers}
        idle = {"delta"} if self.method == "regularize" else {"weight", "gradient_ratio"}
        if self.selection == "topk":
            idle |= {"inhibit_fraction", "threshold_rate", "threshold_rate_floor"}
        else:
            idle.add("topk")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}

    def _contradictions(self) -> Iterator[Problem]:
        if self.threshold_rate_floor > self.threshold_rate:
            yield Problem(
                "threshold_rate_floor",
                self.threshold_rate_floor,
                f"greater than threshold_rate = {self.threshold_rate}, from which the step size "
                "decays to it",
                "lower it, or raise threshold_rate",
            )
        if self.gradient_ratio is not None:
            yield from self._contradictions_of_ratio(self.gradient_ratio)
        if self.scale_invariant and self.method != "regularize":
            yield Problem(
                "scale_invariant",
                True,
                f"only L_MS has this form, method is {self.method!r}",
                "use method = 'regularize' or scale_invariant = false",
            )
        if self.memel_code_compat and (self.method, self.selection) != ("deactivate", "topk"):
            yield Problem(
                "memel_code_compat",
                True,
                f"MEmeL's code deactivates the top k, here method is {self.method!r} and "
                f"selection {self.selection!r}",
                "use method = 'deactivate' and selection = 'topk'",
            )

    def _contradictions_of_ratio(self, ratio: float) -> Iterator[Problem]:
        if self.weight is not None:
            yield Problem(
                "gradient_ratio",
                ratio,
                f"sets the weight of L_MS, and weight = {self.weight} does too",
                "give one of the two, and null for the other",
            )
        if self.method != "regularize":
            yield Problem(
                "gradient_ratio",
                ratio,
                f"sets the weight of L_MS, which method = {self.method!r} has not",
                "use method = 'regularize', or leave gradient_ratio out (null)",
            )


def _problems(field: Field, hint: Any, config: L2EConfig) -> Iterator[Problem]:
    """What is wrong with one key's value."""
    value, fix = getattr(config, field.name), f"give {field.metadata['help']}"
    if not _fits(value, hint):
        yield Problem(field.name, value, f"expected {_describe(hint)}", fix)
        return
    for name, (words, holds) in BOUNDS.items():
        bound = field.metadata.get(name)
        if None not in (bound, value) and not holds(value, bound):
            yield Problem(field.name, value, f"must be {words} {bound}", fix)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if origin in (Union, UnionType):
        return ", or ".join(_describe(option) for option in get_args(hint))
    if origin is list:
        return f"a list of {get_args(hint)[0].__name__}"
    if hint is NoneType:
        return "null"
    return {"float": "a number", "int": "a whole number", "bool": "true or false"}[hint.__name__]


def select_layers(layers: LayerChoice | list[int], num_layers: int) -> tuple[int, ...]:
    """The inhibited blocks' numbers, ascending, of a model with `num_layers` blocks.

    `mid2` are the two middle blocks (of an odd number, the middle one and the one before it),
    `mid_third` the middle third, `top_bottom` the first and the last.
    """
    if isinstance(layers, list):
        outside = [n for n in layers if not 0 <= n < num_layers]
        if not layers or outside or len(set(layers)) != len(layers):
            raise Problem(
                "layers",
                layers,
                f"expected distinct block numbers from 0 to {num_layers - 1}"
                + (f", found {outside}" if outside else ""),
                "choose others",
            )
        return tuple(sorted(layers))
    if layers == "all":
        return tuple(range(num_layers))
    if layers == "top_bottom":
        return tuple(sorted({0, num_layers - 1}))
    count = 2 if layers == "mid2" else max(1, round(num_layers / 3))
    count = min(count, num_layers)
    start = (num_layers - count) // 2
    return tuple(range(start, start + count))
