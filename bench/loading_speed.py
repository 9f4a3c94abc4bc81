"""Reading batches: tokens/s of one process, from a memory-mapped file in gpt-neox's order."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

from bench.random_tokens import write_random_tokens
from bench.timing import estimate, seconds
from data import batches, open_dataset

SEQUENCE_LENGTH, BATCH = 2048, 32
TOKENS = 64 * 2**20


def measure(rounds: int = 10, steps: int = 20) -> dict:
    """Tokens/s of `steps` batches of 32 x 2049 tokens, and seconds to open the set."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_random_tokens(Path(folder) / "tokens", TOKENS, vocab_size=50257)
        samples = (rounds + 1) * steps * BATCH
        begin = time.perf_counter()
        dataset = open_dataset(str(prefix), SEQUENCE_LENGTH, 1234, samples)
        opened = time.perf_counter() - begin
        stream = batches(dataset, 0, BATCH, BATCH)
        rates = [
            steps * BATCH * SEQUENCE_LENGTH / seconds(lambda: list(islice(stream, steps)))
            for _ in range(rounds)
        ]
    return {
        "tokens_in_file": TOKENS,
        "seconds_to_open": opened,
        "tokens_per_second": estimate(rates).as_dict(),
    }
