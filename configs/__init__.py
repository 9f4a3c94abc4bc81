"""The configuration of a run: its schema, its checks, and the files shipped beside them."""

from configs.loading import help_text, load
from configs.schema import Config
from l2e.problems import ConfigError, Problem

__all__ = ["Config", "ConfigError", "Problem", "help_text", "load"]
