"""Whether a resumed run would go on with the data it began with."""

from collections.abc import Iterator
from typing import Any

from l2e.problems import Problem

# What each entry of a training set's identity is to a user.
MEANINGS = {
    "index_sha256": "the corpus (its .idx file)",
    "tokens_sha256": "the corpus (its .bin file)",
    "tokenizer_sha256": "the tokenizer it was prepared with",
    "documents": "the split between training and validation",
    "order": "data.order",
    "sequence_length": "data.sequence_length",
    "seed": "train.seed",
    "epochs": "the number of epochs laid out (train.steps or train.global_batch_size)",
    "shares": "the weights of data.path",
    "order_hash": "the tokens of the first samples",
}


def refuse_changes(before: dict, now: dict) -> None:
    """Hold two training sets against each other: identities, or dicts that hold them.

    Raises ValueError that says what changed and how, where they aren't the same.
    """
    found = list(changes(before, now))
    if found:
        raise Problem(
            "training set",
            None,
            f"is not the one this run began with, changed: {'; '.join(found)}",
            "put it back as it was, or start a new run (from these weights: launch/export.py "
            "to-hf, then from-hf)",
        )


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Descriptions of everything that differs, through nested dicts and lists of them."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from changes(before.get(key), now.get(key), key)
    elif _is_parts(before) and _is_parts(now) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True), start=1):
            yield from (f"file {number}: {change}" for change in changes(old, new))
    elif before != now:
        yield f"{MEANINGS.get(name, name)} from {_short(before)} to {_short(now)}"


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def _short(value: object) -> str:
    """A value in few characters: of a hash the beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
