"""What a step's batch holds: every sequence as text, and where each part of it comes from."""

from collections import Counter
from collections.abc import Iterator

from data.dataset import Piece, Samples
from data.manifest import Subsets
from data.tokenizer import Tokenizer


def describe_step(
    dataset: Samples,
    tokenizer: Tokenizer | None,
    step: int,
    global_batch_size: int,
    rows: int,
    characters: int,
) -> Iterator[str]:
    """Lines about the first `rows` sequences of a step, at most so many `characters` of each.

    Step k, counted from 0, is samples [k*global, (k+1)*global). Without a tokenizer the ids are
    shown. Raises ValueError for a step past the end.
    """
    steps = len(dataset) // global_batch_size
    if not 0 <= step < steps:
        raise ValueError(f"--step {step}: the training set has steps 0 to {steps - 1}")
    first = step * global_batch_size
    yield (
        f"step {step}: samples {first:,} to {first + global_batch_size - 1:,}, "
        f"{global_batch_size} x {dataset.sequence_length + 1} tokens, sha256 "
        f"{dataset.order_hash(global_batch_size, first)}"
    )
    subsets: dict[str, Subsets] = {}
    for i in range(first, first + min(rows, global_batch_size)):
        yield f"\nsample {i:,}"
        for piece in dataset.pieces(i):
            name = piece.file.prefix
            yield f"  {_whence(piece, subsets.setdefault(name, Subsets(name)))}"
        ids = dataset[i]
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        yield _indented(text, characters)


def describe_samples(dataset: Samples, samples: range) -> str:
    """Which samples, and how many of their tokens are from each subset, the largest share first."""
    tokens: Counter[str] = Counter()
    subsets: dict[str, Subsets] = {}
    for i in samples:
        for piece in dataset.pieces(i):
            name = piece.file.prefix
            found = subsets.setdefault(name, Subsets(name)).name_of(piece.document) or name
            tokens[found] += piece.stop - piece.start
    total = sum(tokens.values())
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in tokens.most_common())
    return f"samples {samples[0]:,} to {samples[-1]:,}, {shares}"


def _whence(piece: Piece, subsets: Subsets) -> str:
    """A piece's subset, document and place in it."""
    file, document, start, stop = piece
    subset = subsets.name_of(document)
    return (
        f"{f'[{subset}] ' if subset else ''}{file.prefix} document {document:,}, "
        f"tokens {start:,} to {stop - 1:,} of {int(file.lengths[document]):,}"
    )


def _indented(text: str, characters: int) -> str:
    """The text's beginning, marked off line by line; what a terminal would act on is escaped."""
    shown = text[:characters]
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in shown)
    lines = [f"  | {line}" for line in shown.split("\n")]
    if len(text) > characters:
        lines.append(f"  | ... {len(text) - characters:,} more characters")
    return "\n".join(lines)
