"""From sources to token files: read, tokenize on several processes, write whole or not at all."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import manifest
from data.corpus import Fields, Source, read_units
from data.files import sha256, sync, write_json
from data.index import bin_path, idx_path, write_index
from data.partial import LENGTHS, MANIFEST, REJECTS, SUBSETS, TOKENS, PartialCorpus
from data.records import Reject, parse
from data.tokenizer import Tokenizer, load_tokenizer
from l2e.progress import Progress

INDEX = "index"  # its name inside the partial folder
BATCH_CHARACTERS = 2**19  # text handed to a worker at a time
BATCH_DOCUMENTS = 2**10
COMMIT_TOKENS = 2**24  # a killed preparation loses less than this
REJECTS_BEFORE_STOP = 1000  # units to see before too many rejects stop the work


@dataclass(frozen=True)
class Preparation:
    """What to prepare, and how.

    `max_rejects` is the share of units that may be rejected; `workers` the processes that
    tokenize, beside the one that reads and writes. The result doesn't depend on them.
    """

    sources: list[Source]
    tokenizer: Path
    output: str
    fields: Fields = field(default_factory=Fields)
    workers: int = 1
    max_rejects: float = 0.01


class Interrupted(ValueError):
    """The work stopped, and the same command takes it up again."""


class Batch(NamedTuple):
    """Units read together: the documents among them, the rejects, and how far the source is."""

    texts: list[str]
    subsets: list[str]
    rejects: list[Reject]
    units: int
    position: int


def prepare(what: Preparation) -> dict:
    """Write PREFIX.bin, .idx, .manifest.json and, where needed, .subsets and .rejects.jsonl.

    Goes on where an earlier, interrupted call with the same sources and tokenizer stopped.
    Returns the manifest. Raises ValueError for a user's mistake: nothing is left behind then,
    but the rejects where there were too many of them.
    """
    tokenizer = load_tokenizer(what.tokenizer)
    job = {
        "sources": [[Path(s.name).name, s.format, s.sha256()] for s in what.sources],
        "tokenizer": tokenizer.sha256,
        "fields": asdict(what.fields),
    }
    folder = Path(f"{what.output}.partial")
    done = None if (folder / MANIFEST).exists() else _already_done(what.output, job)
    if done is not None:
        print(f"{what.output}: already prepared from these sources", flush=True)
        return done
    with PartialCorpus(folder, job) as partial:
        try:
            if not partial.finished:
                _tokenize(what, partial)
                _check_rejects(what, partial, at_end=True)
                _finish(what, partial, job, tokenizer)
            return _move_into_place(what.output, partial)
        except Interrupted:
            raise
        except ValueError:
            partial.keep_rejects(Path(f"{what.output}.{REJECTS}"))
            partial.remove()
            raise
        except OSError as error:
            raise _writing_failed(what.output, partial, error) from error


def _writing_failed(output: str, partial: PartialCorpus, error: OSError) -> ValueError:
    """What to tell when the disk is full; keeps only what can be gone on from."""
    if partial.committed:
        return Interrupted(
            f"output {output}: writing failed ({error}); free space and run the same command to "
            f"go on from what {partial.folder} holds"
        )
    partial.remove()
    return ValueError(
        f"output {output}: writing failed ({error}), nothing is left behind; free space, or "
        "choose another --output"
    )


def _already_done(output: str, job: dict) -> dict | None:
    """The manifest of a finished preparation of the same job; ValueError for another's."""
    found = manifest.read(output)
    if found is None and not bin_path(output).exists():
        return None
    if found is not None and found.get("job") == job:
        return found
    raise ValueError(
        f"output {output}: token files of other sources, another tokenizer or another tool are "
        "there already; delete them or choose another --output"
    )


def _tokenize(what: Preparation, partial: PartialCorpus) -> None:
    """Everything the sources still have, into the partial corpus, in their order."""
    starts, total = _source_starts(what.sources)
    progress = Progress(total=total or None, desc="preparing", unit="B", unit_scale=True)
    committed, text_bytes = partial.tokens, partial.text_bytes
    units = read_units(what.sources, what.fields, skip=partial.units)
    try:
        for batch, (tokens, lengths) in _encoded(what, _batches(units, what.fields, starts)):
            partial.add(tokens, lengths, batch.subsets, batch.rejects)
            partial.units += batch.units
            partial.text_bytes += sum(map(_utf8_size, batch.texts))
            speed = (partial.text_bytes - text_bytes) / 1e6 / progress.format_dict["elapsed"]
            progress.set_postfix_str(
                f"{speed:.2f} MB/s of text, {partial.documents:,} documents, "
                f"{partial.tokens:,} tokens",
                refresh=False,
            )
            progress.advance_to(batch.position)
            _check_rejects(what, partial)
            if partial.tokens - committed > COMMIT_TOKENS:
                partial.commit()
                committed = partial.tokens
    except BrokenProcessPool as error:
        partial.commit()
        raise Interrupted(
            f"output {what.output}: a worker died, out of memory perhaps; run the same command "
            "with fewer --workers to go on"
        ) from error
    except KeyboardInterrupt:  # it may come at any point, so only what is committed counts
        print("stopped; the same command goes on from the last commit", flush=True)
        raise
    finally:
        progress.close()


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _source_starts(sources: list[Source]) -> tuple[dict[Source, int], int]:
    """Where each source starts if all lay end to end, and their sum, in bytes."""
    starts, total = {}, 0
    for source in sources:
        starts[source] = total
        total += Path(source.name).stat().st_size if Path(source.name).exists() else 0
    return starts, total


def _batches(units: Iterable, fields: Fields, starts: dict[Source, int]) -> Iterator[Batch]:
    """Units in groups of bounded size."""
    texts, subsets, rejects, count, size, position = [], [], [], 0, 0, 0
    for unit in units:
        found = parse(unit, fields)
        if isinstance(found, Reject):
            rejects.append(found)
        else:
            texts.append(found.text)
            subsets.append(found.subset)
            size += len(found.text)
        count += 1
        position = starts[unit.source] + unit.position
        if size >= BATCH_CHARACTERS or count >= BATCH_DOCUMENTS:
            yield Batch(texts, subsets, rejects, count, position)
            texts, subsets, rejects, count, size = [], [], [], 0, 0
    if count:
        yield Batch(texts, subsets, rejects, count, position)


Encoded = tuple[np.ndarray, list[int]]  # tokens laid end to end, and each document's length


def _encoded(what: Preparation, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Encoded]]:
    """Batches with their tokens, in order; a few of them wait in memory, never the corpus."""
    if what.workers == 1:
        _start_worker(what.tokenizer)
        yield from ((batch, _encode(batch.texts)) for batch in batches)
        return
    pool = ProcessPoolExecutor(what.workers, get_context("spawn"), _start_worker, (what.tokenizer,))
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch.texts)))
            if len(waiting) > 2 * what.workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer_path: Path) -> None:
    """Make `_encode` ready in this process; a worker ends with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer_path)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_tokenizer: Tokenizer  # a worker's own, loaded once


def _encode(texts: list[str]) -> Encoded:
    """Tokens of the texts, each ended by the end-of-text token."""
    documents = [[*ids, _tokenizer.eod] for ids in _tokenizer.encode_batch(texts)]
    tokens = [np.array(document, _tokenizer.dtype) for document in documents]
    empty = np.empty(0, _tokenizer.dtype)
    return np.concatenate([empty, *tokens]), [len(document) for document in documents]


def _check_rejects(what: Preparation, partial: PartialCorpus, at_end: bool = False) -> None:
    """Stop where too much of the input can't be used."""
    allowed = what.max_rejects * partial.units
    if partial.rejects <= allowed or not (at_end or partial.units >= REJECTS_BEFORE_STOP):
        if at_end and not partial.documents:
            raise ValueError(f"output {what.output}: the input holds no documents")
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in partial.reasons.most_common(5))
    raise ValueError(
        f"{partial.rejects} of {partial.units} records can't be used ({reasons}), above "
        f"--max-rejects {what.max_rejects:g}; they are listed in {what.output}.{REJECTS}: repair "
        "the input or raise the limit"
    )


def _finish(what: Preparation, partial: PartialCorpus, job: dict, tokenizer: Tokenizer) -> None:
    """Write the index and the manifest, still inside the partial folder."""
    partial.commit()
    folder = partial.folder
    lengths = np.memmap(folder / LENGTHS, np.int32, "r")
    write_index(folder / INDEX, np.dtype(tokenizer.dtype), lengths)
    sync(folder / INDEX)
    counts = {name: {"documents": d, "tokens": t} for name, (_, d, t) in partial.subsets.items()}
    write_json(
        folder / MANIFEST,
        {
            "documents": partial.documents,
            "tokens": partial.tokens,
            "text_bytes": partial.text_bytes,
            "subsets": counts,
            "rejects": {"total": partial.rejects, "reasons": dict(partial.reasons)},
            "dtype": np.dtype(tokenizer.dtype).name,
            "bin_sha256": sha256(folder / TOKENS),
            "idx_sha256": sha256(folder / INDEX),
            "tokenizer_path": str(what.tokenizer),
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.eod,
            "sources": [
                {"name": s.name, "sha256": hash_}
                for s, (*_, hash_) in zip(what.sources, job["sources"], strict=True)
            ],
            "job": job,
        },
    )


def _move_into_place(output: str, partial: PartialCorpus) -> dict:
    """Rename the finished files, the manifest last; a second call goes on with the rest."""
    folder = partial.folder
    targets = {TOKENS: bin_path(output), INDEX: idx_path(output)}
    if len(partial.subsets) > 1:
        targets[SUBSETS] = Path(f"{output}.{SUBSETS}")
    if partial.rejects:
        targets[REJECTS] = Path(f"{output}.{REJECTS}")
    targets[MANIFEST] = manifest.path(output)
    for name, target in targets.items():
        if (folder / name).exists():
            (folder / name).replace(target)
    sync(manifest.path(output).parent)
    partial.remove()
    written = manifest.read(output)
    assert written is not None
    return written
