"""Learning towards emergence: observe and inhibit a model's monosemantic neurons."""

from l2e.attach import Handle, attach
from l2e.config import L2EConfig, select_layers
from l2e.controller import Controller
from l2e.layer import L2ELayer
from l2e.sharding import Sharding

__all__ = [
    "Controller",
    "Handle",
    "L2EConfig",
    "L2ELayer",
    "Sharding",
    "attach",
    "select_layers",
]
