"""Progress of a preparation: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 15.0


class Progress:
    """Shows how much of the sources is read, and MB/s of text, documents and tokens so far.

    `total` is in bytes of the sources as they lie on the disk, 0 where that isn't known.
    """

    def __init__(self, total: int):
        self._total = total
        self._start = self._told = time.monotonic()
        self._text_bytes = 0
        self._bar = tqdm(
            total=total or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        )

    def update(self, position: int, new_text_bytes: int, documents: int, tokens: int) -> None:
        """`position` of the sources is read; the counts are of everything so far."""
        self._text_bytes += new_text_bytes
        seconds = time.monotonic() - self._start
        text = (
            f"{self._text_bytes / 1e6 / max(seconds, 1e-9):.2f} MB/s of text, "
            f"{documents:,} documents, {tokens:,} tokens"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(position - self._bar.n)
        elif time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            print(f"{self._share(position, seconds)}{text}", file=sys.stderr, flush=True)

    def _share(self, position: int, seconds: float) -> str:
        if not self._total or not position:
            return ""
        share = min(1.0, position / self._total)
        left = seconds * (1 - share) / share
        return f"{share:.0%}, {left / 60:.0f} min left, "

    def close(self) -> None:
        self._bar.close()
