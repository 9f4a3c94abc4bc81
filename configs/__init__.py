"""The configuration of a run: its schema, its checks, and the files shipped beside them."""

from configs.loading import help_text, load
from configs.problems import ConfigError, Problem
from configs.schema import Config

__all__ = ["Config", "ConfigError", "Problem", "help_text", "load"]
