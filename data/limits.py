"""What a corpus may lose before its preparation is stopped."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.corpus import Source
from data.formats import JSON_LINES, TEXT, beginning, hint
from data.partial import REJECTS, PartialCorpus

# What has to be seen before the shares mean something; smaller sources are judged at their end.
UNITS = 1000
CHARACTERS = 2**24


class Limits(NamedTuple):
    """Largest shares: of the units of each source, and of all, that may be rejected; and of the
    ids, of the characters and of the documents for which the tokenizer has nothing."""

    rejects: float = 0.01
    unknown: float = 0.01


@dataclass
class Judge:
    """Looks at a preparation as it goes on; every look may raise ValueError, which ends it."""

    partial: PartialCorpus
    sources: list[Source]
    limits: Limits
    output: str
    share: bool = False  # a share of the sources: what is about all of them is judged by `join`
    judged: int = 0  # sources that were looked at after their end

    def look(self, reading: int) -> None:
        """Judge what is done; `reading` is the number of the source the work has come to."""
        partial, at_end = self.partial, reading == len(self.sources)
        if not self.share and (at_end or partial.units >= UNITS):
            self._check_rejects()
        for number in range(self.judged, reading):
            self._check_source(number)
        self.judged = reading
        if not at_end and partial.given(reading).units >= UNITS:
            self._check_source(reading)
        if self.share:
            return
        if at_end:
            self._check_text_files()
            if not partial.documents:
                raise ValueError(f"output {self.output}: the input holds no documents")
        if at_end or partial.units >= UNITS or partial.said["characters"] >= CHARACTERS:
            self._check_unknown()

    def _check_rejects(self) -> None:
        partial = self.partial
        if partial.rejects <= self.limits.rejects * partial.units:
            return
        reasons = ", ".join(f"{n} x {reason}" for reason, n in partial.reasons.most_common(5))
        worst = max(partial.files, key=lambda number: partial.files[number].rejects)
        first = partial.given(worst).reason
        raise ValueError(
            f"{partial.rejects} of {partial.units} records can't be used ({reasons}), most of them "
            f"in {self.sources[worst].name} ({first}), {self._above(self.sources[worst])}"
        )

    def _check_source(self, number: int) -> None:
        """A source gives documents, and not too few; texts and parts are judged together."""
        source, given = self.sources[number], self.partial.given(number)
        if source.format == TEXT or source.span:
            return
        documents, rejects, reason = given.documents, given.rejects, given.reason
        why = f" ({reason})" if reason else ""
        if not documents:
            fix = f"{_looks_like(source)}get a whole copy of it, or leave it out"
            raise ValueError(f"input {source.name}: holds no documents{why}; {fix}")
        if rejects > self.limits.rejects * (documents + rejects):
            raise ValueError(
                f"input {source.name}: {rejects} of {documents + rejects} records can't be used"
                f"{why}, {self._above(source)}"
            )

    def _check_text_files(self) -> None:
        """Text files hold one document each, so that they are judged together."""
        numbers = [n for n, source in enumerate(self.sources) if source.format == TEXT]
        bad = [number for number in numbers if self.partial.given(number).rejects]
        if len(bad) > self.limits.rejects * len(numbers):
            reason = self.partial.given(bad[0]).reason
            raise ValueError(
                f"input {self.sources[bad[0]].name}: can't be used ({reason}), as {len(bad)} of "
                f"{len(numbers)} text files, {self._above(self.sources[bad[0]])}"
            )

    def _above(self, source: Source) -> str:
        return (
            f"above --max-rejects {self.limits.rejects:g}; {_looks_like(source)}they are listed in "
            f"{self.output}.{REJECTS}: repair the input or raise the limit"
        )

    def _check_unknown(self) -> None:
        partial, said = self.partial, self.partial.said
        shares = {
            "characters": (said["unknown_characters"], said["characters"]),
            "ids": (said["unknown_ids"], partial.tokens),
            "documents": (said["empty_documents"], partial.documents),
        }
        for kind, (unknown, total) in shares.items():
            if unknown > self.limits.unknown * total:
                example = f", as in {partial.example!r}" if partial.example else ""
                raise ValueError(
                    f"the tokenizer has nothing for {unknown:,} of {total:,} {kind} "
                    f"({unknown / total:.1%}){example}, above --max-unknown "
                    f"{self.limits.unknown:g}; take one made for this text, or raise the limit"
                )


def _looks_like(source: Source) -> str:
    if source.format != JSON_LINES:
        return ""
    return hint(beginning(Path(source.name), source.compression))
