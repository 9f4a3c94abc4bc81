"""What a corpus loses on its way into tokens, counted: nothing of it shows in the token files."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import numpy as np

from data.tokenizer import END_OF_TEXT, Tokenizer

COUNTS = {
    "characters": "characters of text",
    "unknown_ids": "ids that stand for something the tokenizer has no token for",
    "unknown_characters": "characters, spaces aside, that it has no token for",
    "empty_documents": "documents of which no token is left",
    "end_of_text_ids": "end-of-text tokens that come from the texts themselves",
}


def _as_spaces(found: str) -> set[str]:
    return {"", " ", " " * len(found)} - {found}


def _without_accents(found: str) -> set[str]:
    return {unicodedata.normalize("NFD", found)[0]}


# What a normalisation may lose, and what it then makes of it; spaces between characters that are
# none.
KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], set[str]]]] = {
    "line breaks": (re.compile(r"(?<=\S)\n+(?=\S)"), _as_spaces),
    "tabs": (re.compile(r"(?<=\S)\t+(?=\S)"), _as_spaces),
    "runs of spaces": (re.compile(r"(?<=\S) {2,}(?=\S)"), _as_spaces),
    "capital letters": (re.compile("[A-Z]"), lambda found: {found.lower()}),
    "accents": (re.compile("[À-ÅÈ-Ïà-åè-ï]"), _without_accents),
}
AROUND = 20  # characters of an example on either side


class Encoded(NamedTuple):
    """Documents as tokens laid end to end, with what they lost."""

    tokens: np.ndarray
    lengths: list[int]
    said: Counter[str]  # see COUNTS
    inside: Counter[str]  # end-of-text tokens written out in the texts
    example: str  # of a text with something that has no token, "" if there is none


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Tokens of the texts, each ended by the end-of-text token."""
    ids = tokenizer.encode_batch(texts)
    documents = [np.array([*of_text, tokenizer.eod], tokenizer.dtype) for of_text in ids]
    tokens = np.concatenate([np.empty(0, tokenizer.dtype), *documents])
    said = Counter(
        characters=sum(map(len, texts)),
        empty_documents=sum(not of_text for of_text in ids),
        end_of_text_ids=int((tokens == tokenizer.eod).sum()) - len(texts),
    )
    example = ""
    for number in _suspects(tokenizer, tokens, ids):
        found = tokenizer.unsaid(texts[number])
        said["unknown_ids"] += found.ids
        said["unknown_characters"] += found.characters
        if found.ids and not example:
            example = texts[number].strip()[: 2 * AROUND]
    inside: Counter[str] = Counter()
    end = tokenizer.name_of(tokenizer.eod)
    names = dict.fromkeys((*END_OF_TEXT, end))
    for text in texts:
        if "<" in text or "[" in text or end in text:
            inside.update({name: count for name in names if (count := text.count(name))})
    return Encoded(tokens, [len(document) for document in documents], +said, inside, example)


def _suspects(tokenizer: Tokenizer, tokens: np.ndarray, ids: list[list[int]]) -> list[int]:
    """The documents that may hold something without a token."""
    if tokenizer.leaves_out:
        return list(range(len(ids)))
    if tokenizer.unknown is None or not (tokens == tokenizer.unknown).any():
        return []
    return [number for number, of_text in enumerate(ids) if tokenizer.unknown in of_text]


def find_lost(tokenizer: Tokenizer, text: str, known: Container[str]) -> dict[str, str]:
    """The kinds of character, beside the known ones, that this text has.

    Their value is an example where the tokens don't tell such a character from another one or from
    none, and "" where they do.
    """
    kinds = {}
    for kind, (pattern, lost) in KINDS.items():
        found = pattern.search(text) if kind not in known else None
        if found:
            before, after = text[: found.start()][-AROUND:], text[found.end() :][:AROUND]
            shown = before + found.group() + after
            if not found.group().isspace() and tokenizer.unsaid(shown).ids:
                continue  # of what is unknown nothing is kept: another text tells
            others = [before + other + after for other in lost(found.group())]
            same = tokenizer.encode(shown) in tokenizer.encode_batch(others)
            kinds[kind] = shown if same else ""
    return kinds
