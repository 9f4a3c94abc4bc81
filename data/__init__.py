"""Corpus -> tokenizer -> index -> dataset: text in, batches in a known order out."""

from data.check import check, check_one_tokenizer, check_tokenizer, default_tokenizer
from data.dataset import ORDER_NAMES, Chain, Samples, open_dataset
from data.identity import refuse_changes
from data.loader import batches, prefetch
from data.tokenizer import load_tokenizer
from l2e.problems import Problem

__all__ = [
    "ORDER_NAMES",
    "Chain",
    "Problem",
    "Samples",
    "batches",
    "check",
    "check_one_tokenizer",
    "check_tokenizer",
    "default_tokenizer",
    "load_tokenizer",
    "open_dataset",
    "prefetch",
    "refuse_changes",
]
