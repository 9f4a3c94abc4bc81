"""How fast text is tokenized, and a large index is opened.

    python bench/data_speed.py tokenize --input corpus.jsonl.zst --tokenizer 20B_tokenizer.json
    python bench/data_speed.py start --tokens 10e9

Tokenizing is held against the bare `tokenizers` library, which uses every core, and against
preprocessing one document at a time as Megatron-LM does it. The three take turns, each in a
process of its own. MB of text a second of the wall are what a user sees; MB a second of processor
time stay the same when others use the machine too.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import tokenizers

sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import open_dataset
from data.corpus import Fields, find_sources, read_units
from data.index import TokenFile, bin_path, idx_path, write_index
from data.prepare import Preparation, prepare
from data.records import Record, parse
from launch.cli import run_verb

WAYS = ("ours", "bare", "one_by_one")


def main() -> None:
    options = _parse()
    if options.what == "tokenize":
        compare_tokenizing(options)
    elif options.what == "way":
        tokenize(options.way, options.input, options.tokenizer, options.workers, options.output)
    else:
        open_large(int(options.tokens))


def compare_tokenizing(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        size = _cut_corpus(options.input, corpus, options.megabytes * 1e6)
        print(f"{size / 1e6:.1f} MB of text, {options.workers} workers, {options.rounds} rounds")
        rates: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for turn, way in itertools.product(range(options.rounds), WAYS):
            output = Path(folder) / f"{way}{turn}"
            command = [sys.executable, __file__, "way", way, str(corpus), options.tokenizer]
            before, start = _processor_seconds(), time.monotonic()
            subprocess.run([*command, str(options.workers), str(output)], check=True)
            seconds = time.monotonic() - start
            processor = _processor_seconds() - before
            rates[way].append((size / 1e6 / seconds, size / 1e6 / processor))
            print(f"{way:<12}{rates[way][-1][0]:7.2f} MB/s{rates[way][-1][1]:8.2f} MB/processor-s")
    best = {way: np.median(rates[way], axis=0) for way in WAYS}
    for way in WAYS[1:]:
        wall, processor = best["ours"] / best[way]
        print(f"ours / {way}: {wall:.2f} by the wall, {processor:.2f} by processor time (medians)")


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cut_corpus(source: str, target: Path, limit: float) -> int:
    """Plain JSON lines of the first `limit` bytes of text; their exact number of bytes."""
    size = 0
    with target.open("w") as file:
        for unit in read_units(find_sources([source]), Fields()):
            record = parse(unit, Fields())
            if isinstance(record, Record):
                file.write(json.dumps({"text": record.text}) + "\n")
                size += len(record.text.encode())
            if size >= limit:
                break
    return size


def tokenize(way: str, corpus: str, tokenizer: str, workers: int, output: str) -> None:
    """All of a corpus in one of the three ways, in this process and its children."""
    if way == "ours":
        prepare(Preparation(find_sources([corpus]), Path(tokenizer), output, workers=workers))
    elif way == "bare":
        texts = [json.loads(line)["text"] for line in Path(corpus).read_text().splitlines()]
        tokenizers.Tokenizer.from_file(tokenizer).encode_batch(texts, add_special_tokens=False)
    else:
        with (
            multiprocessing.get_context("spawn").Pool(workers, _start_one, (tokenizer,)) as pool,
            Path(f"{output}.bin").open("wb") as file,
            Path(corpus).open() as lines,
        ):
            for tokens in pool.imap(_encode_one, lines, 32):
                file.write(np.array(tokens, np.uint16).tobytes())


_one: tokenizers.Tokenizer  # of one process of the pool


def _start_one(tokenizer: str) -> None:
    global _one
    _one = tokenizers.Tokenizer.from_file(tokenizer)


def _encode_one(line: str) -> list[int]:
    return [*_one.encode(json.loads(line)["text"]).ids, 0]


def open_large(tokens: int) -> None:
    """Start-up on an index of so many tokens, whose .bin file is all holes."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "large"
        random = np.random.RandomState(0)
        lengths = random.geometric(1 / 1400, tokens // 1400).astype(np.int32)  # the Pile's mean
        write_index(idx_path(prefix), np.dtype(np.uint16), lengths)
        total = int(lengths.sum(dtype=np.int64))
        with bin_path(prefix).open("wb") as file:
            file.truncate(2 * total)
        del lengths
        for name in ("first", "again"):
            start = time.monotonic()
            with _PeakMemory() as peak:
                dataset = open_dataset(
                    str(prefix), 2048, 1234, total // 2048 // 2, cache_dir=folder
                )
                seconds = time.monotonic() - start
                dataset[len(dataset) // 2]
            print(
                f"{total / 1e9:.1f} billion tokens, {len(TokenFile(prefix)):,} documents, "
                f"{name} start: {seconds:.1f} s, "
                f"at most {peak.megabytes:.0f} MB more of its own memory"
            )


class _PeakMemory:
    """Most memory a block of code has of its own: without the pages that files lend it."""

    def __enter__(self):
        self._done, self._start, self.megabytes = threading.Event(), self._now(), 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.megabytes = max(self.megabytes, self._now() - self._start)

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("RssAnon:")]
        return int(line.split()[1]) * 1024 / 1e6


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="what", required=True)
    verb = verbs.add_parser("tokenize")
    verb.add_argument("--input", required=True)
    verb.add_argument("--tokenizer", required=True)
    verb.add_argument("--megabytes", type=float, default=25.0)
    verb.add_argument("--workers", type=int, default=2)
    verb.add_argument("--rounds", type=int, default=3)
    verb = verbs.add_parser("way", help="what `tokenize` starts")
    for name in ("way", "input", "tokenizer"):
        verb.add_argument(name)
    verb.add_argument("workers", type=int)
    verb.add_argument("output")
    verb = verbs.add_parser("start")
    verb.add_argument("--tokens", type=float, default=10e9)
    return parser.parse_args()


if __name__ == "__main__":
    run_verb(main)
