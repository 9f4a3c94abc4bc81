"""From sources to token files: read, tokenize on several processes, write whole or not at all."""

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from data import manifest
from data.corpus import Fields, Source, Unit, read_units
from data.files import sha256, sync, write_json
from data.folders import PassedOver
from data.index import bin_path, idx_path, write_index
from data.limits import Judge, Limits
from data.partial import LENGTHS, MANIFEST, REJECTS, SUBSETS, TOKENS, Given, PartialCorpus
from data.records import Record, Reject, parse
from data.shares import Share
from data.tokenizer import Tokenizer, load_tokenizer
from data.wording import COUNTS, KINDS, Encoded, encode, find_lost
from l2e.problems import Problem
from l2e.progress import Progress, say

INDEX = "index"  # its name inside the partial folder
BATCH_CHARACTERS = 2**19  # text handed to a worker at a time
BATCH_DOCUMENTS = 2**10
COMMIT_TOKENS = 2**24  # a killed preparation loses less than this


@dataclass(frozen=True)
class Preparation:
    """What to prepare, and how.

    `workers` are the processes that tokenize, beside the one that reads and writes; the result
    doesn't depend on them. `end_of_text` names the token that ends documents, where the tokenizer
    leaves that open; `passed_over` is what lies beside the sources, for the manifest; of a `share`,
    `sources` are its own.
    """

    sources: list[Source]
    tokenizer: Path
    output: str
    fields: Fields = field(default_factory=Fields)
    workers: int = 1
    limits: Limits = field(default_factory=Limits)
    end_of_text: str | None = None
    passed_over: PassedOver = field(default_factory=dict)
    share: Share | None = None


class Interrupted(ValueError):
    """The work stopped, and the same command takes it up again."""


@dataclass
class Batch:
    """Units read together: the documents among them, the rejects, and how far the source is."""

    texts: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    files: dict[int, Given] = field(default_factory=dict)  # by the source's number
    characters: int = 0
    source: int = 0  # the number of the one that was read last
    position: int = 0

    @property
    def units(self) -> int:
        return len(self.texts) + len(self.rejects)

    def add(self, found: Record | Reject, source: int) -> None:
        """The next unit, of a source's number."""
        self.source = source
        given = self.files.setdefault(source, Given())
        if isinstance(found, Reject):
            self.rejects.append(found)
            given.rejects += 1
            given.reason = given.reason or found.reason
        else:
            self.texts.append(found.text)
            self.subsets.append(found.subset)
            self.characters += len(found.text)
            given.documents += 1


def prepare(what: Preparation) -> dict:
    """Write PREFIX.bin, .idx, .manifest.json and, where needed, .subsets and .rejects.jsonl.

    Goes on where an earlier, interrupted call with the same sources and tokenizer stopped.
    Returns the manifest. Raises ValueError for a user's mistake: nothing is left behind then,
    but the rejects where there were too many of them.
    """
    tokenizer = load_tokenizer(what.tokenizer, what.end_of_text)
    before = [source.look() for source in what.sources]
    job = {
        "end_of_text": tokenizer.eod,
        "sources": [[Path(s.name).name, s.format, s.sha256()] for s in what.sources],
        "tokenizer": tokenizer.sha256,
        "fields": asdict(what.fields),
        **({"share": what.share.job} if what.share else {}),
    }

    def fill(partial: PartialCorpus) -> None:
        tokenize(what, partial, tokenizer, before)
        about = {
            "dtype": np.dtype(tokenizer.dtype).name,
            "tokenizer_path": str(what.tokenizer),
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.eod,
            "end_of_text_token": tokenizer.name_of(tokenizer.eod),
            "passed_over": what.passed_over,
            "job": job,
            **({"share": what.share.facts()} if what.share else {}),
        }
        finish(partial, what.sources, about)

    return write_whole(what.output, job, fill, job)


def write_whole(
    output: str, job: dict, fill: Callable[[PartialCorpus], None], partial_job: dict
) -> dict:
    """All files of a corpus that `fill` makes, or none; the manifest, which holds `job`.

    `partial_job` is what a preparation has to be of to be gone on with. Raises ValueError.
    """
    folder = Path(f"{output}.partial")
    done = None if (folder / MANIFEST).exists() else _already_done(output, job)
    if done is not None:
        print(f"{output}: already prepared from these sources", flush=True)
        return done
    with PartialCorpus(folder, partial_job) as partial:
        try:
            if not partial.finished:
                fill(partial)
            return move_into_place(output, partial)
        except Interrupted:
            raise
        except ValueError:
            partial.keep_rejects(Path(f"{output}.{REJECTS}"))
            partial.remove()
            raise
        except OSError as error:
            raise _writing_failed(output, partial, error) from error


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
    # Once a job didn't name the end of text; the manifest always did.
    if found is not None and {"end_of_text": found.get("end_of_text"), **found["job"]} == job:
        return found
    raise ValueError(
        f"output {output}: token files of other sources, another tokenizer or another tool are "
        "there already; delete them or choose another --output"
    )


def refuse_written_to(source: Source, before: tuple[int, int, int] | None) -> None:
    """Raise ValueError where a source isn't what it was when its hash was taken."""
    if source.look() != before:
        raise Problem(
            "input",
            Path(source.name),
            "was written to, replaced or removed while it was read",
            "prepare it when nobody writes to it any more",
        )


def tokenize(
    what: Preparation,
    partial: PartialCorpus,
    tokenizer: Tokenizer,
    before: Sequence[tuple[int, int, int] | None],
) -> None:
    """Everything the sources still have, into the partial corpus, in their order.

    before: each source's `look` before anything of it was read.
    """
    starts, total = _source_starts(what.sources)
    progress = Progress(total=total or None, desc="preparing", unit="B", unit_scale=True)
    committed, text_bytes = partial.tokens, partial.text_bytes
    units = read_units(what.sources, what.fields, skip=partial.units)
    batches = _looked_at(_batches(units, what, starts), partial, tokenizer)
    judge = Judge(partial, what.sources, what.limits, what.output, what.share is not None)
    try:
        for batch, encoded in _encoded(what, batches):
            _add(partial, batch, encoded)
            speed = (partial.text_bytes - text_bytes) / 1e6 / progress.format_dict["elapsed"]
            progress.set_postfix_str(
                f"{speed:.2f} MB/s of text, {partial.documents:,} documents, "
                f"{partial.tokens:,} tokens",
                refresh=False,
            )
            progress.advance_to(batch.position)
            refuse_written_to(what.sources[batch.source], before[batch.source])
            judge.look(batch.source)
            if partial.tokens - committed > COMMIT_TOKENS:
                partial.commit()
                committed = partial.tokens
        for source, looked in zip(what.sources, before, strict=True):
            refuse_written_to(source, looked)
        judge.look(len(what.sources))
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


def _add(partial: PartialCorpus, batch: Batch, encoded: Encoded) -> None:
    """A tokenized batch, and what is counted of it."""
    partial.add(encoded.tokens, encoded.lengths, batch.subsets, batch.rejects)
    partial.units += batch.units
    partial.text_bytes += sum(map(_utf8_size, batch.texts))
    partial.said += encoded.said
    partial.inside += encoded.inside
    partial.example = partial.example or encoded.example
    for number, given in batch.files.items():
        partial.given(number).add(given)


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _looked_at(
    batches: Iterable[Batch], partial: PartialCorpus, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """The batches; tells of each kind of character, once, that the tokenizer doesn't keep it."""
    for batch in batches:
        for text in batch.texts if len(partial.spaces) < len(KINDS) else ():
            for kind, example in find_lost(tokenizer, text, partial.spaces).items():
                partial.spaces[kind] = example
                if example:
                    say(f"the tokenizer doesn't keep {kind}, as in {example!r}")
        yield batch


def _source_starts(sources: list[Source]) -> tuple[list[int], int]:
    """Where each source starts if all lay end to end, and their sum, in bytes."""
    ends = list(itertools.accumulate((source.size for source in sources), initial=0))
    return ends[:-1], ends[-1]


def _batches(units: Iterable[Unit], what: Preparation, starts: list[int]) -> Iterator[Batch]:
    """Units in groups of bounded size."""
    numbers = {source: number for number, source in enumerate(what.sources)}
    source, number, batch = None, 0, Batch()
    for unit in units:
        if unit.source is not source:
            source = unit.source
            number = numbers[source]
        batch.add(parse(unit, what.fields), number)
        if batch.characters >= BATCH_CHARACTERS or batch.units >= BATCH_DOCUMENTS:
            batch.position = starts[number] + unit.position
            yield batch
            batch = Batch()
    if batch.units:
        batch.position = starts[number] + unit.position
        yield batch


def _encoded(what: Preparation, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Encoded]]:
    """Batches with their tokens, in order; a few of them wait in memory, never the corpus."""
    if what.workers == 1:
        _start_worker(what.tokenizer, what.end_of_text)
        yield from ((batch, _encode(batch.texts)) for batch in batches)
        return
    started_with = (what.tokenizer, what.end_of_text)
    pool = ProcessPoolExecutor(what.workers, get_context("spawn"), _start_worker, started_with)
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


def _start_worker(tokenizer_path: Path, end_of_text: str | None) -> None:
    """Make `_encode` ready in this process; a worker ends with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer_path, end_of_text)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_tokenizer: Tokenizer  # a worker's own, loaded once


def _encode(texts: list[str]) -> Encoded:
    return encode(_tokenizer, texts)


def finish(partial: PartialCorpus, sources: list[Source], about: dict) -> None:
    """Write the index and the manifest, still inside the partial folder.

    `about` is what the manifest says beside what is counted: tokenizer, "job", ...
    """
    partial.commit()
    folder = partial.folder
    lengths = np.memmap(folder / LENGTHS, np.int32, "r") if partial.documents else np.empty(0)
    write_index(folder / INDEX, np.dtype(about["dtype"]), lengths)
    sync(folder / INDEX)
    counts = {name: {"documents": d, "tokens": t} for name, (_, d, t) in partial.subsets.items()}
    files = [
        {
            "name": source.name,
            "sha256": hash_,
            "format": source.format,
            "documents": partial.given(number).documents,
            "rejects": partial.given(number).rejects,
        }
        for number, (source, (_, _, hash_)) in enumerate(
            zip(sources, about["job"]["sources"], strict=True)
        )
    ]
    write_json(
        folder / MANIFEST,
        {
            "documents": partial.documents,
            "tokens": partial.tokens,
            "text_bytes": partial.text_bytes,
            "subsets": counts,
            "rejects": {"total": partial.rejects, "reasons": dict(partial.reasons)},
            "wording": {
                **{name: partial.said[name] for name in COUNTS},
                "example": partial.example,
                "end_of_text_written_out": dict(partial.inside),
                "spaces": partial.spaces,
            },
            "bin_sha256": sha256(folder / TOKENS),
            "idx_sha256": sha256(folder / INDEX),
            "sources": files,
            **about,
        },
    )


def move_into_place(output: str, partial: PartialCorpus) -> dict:
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
