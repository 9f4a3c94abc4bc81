"""Learning towards emergence: observe and inhibit a model's monosemantic neurons."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from l2e.config import L2EConfig, select_layers
from l2e.problems import ConfigError, Problem

if TYPE_CHECKING:
    from l2e.attachment import Handle, attach
    from l2e.controller import Controller
    from l2e.layer import L2ELayer
    from l2e.sharding import Sharding

__all__ = [
    "ConfigError",
    "Controller",
    "Handle",
    "L2EConfig",
    "L2ELayer",
    "Problem",
    "Sharding",
    "attach",
    "select_layers",
]
NEED_TORCH = {
    "Controller": "controller",
    "Handle": "attachment",
    "L2ELayer": "layer",
    "Sharding": "sharding",
    "attach": "attachment",
}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for: a look at a configuration doesn't wait."""
    if name not in NEED_TORCH:
        raise AttributeError(f"module 'l2e' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"l2e.{NEED_TORCH[name]}"), name)
    return value
