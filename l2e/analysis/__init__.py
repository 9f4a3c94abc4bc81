"""Measure monosemanticity and self-organisation of trained models: see docs/notebook.md."""

from l2e.analysis.analysis import Result, analyses, run
from l2e.analysis.subject import Subject

__all__ = ["Result", "Subject", "analyses", "run"]
