"""The shares of a corpus, joined to the files that one preparation of all sources makes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, PositiveInt, ValidationError

from data import manifest
from data.corpus import Source
from data.files import sha256
from data.index import HEADER, bin_path, idx_path
from data.limits import Judge, Limits
from data.manifest import Subsets
from data.partial import LENGTHS, REJECTS, SUBSETS, TOKENS, Given, PartialCorpus
from data.prepare import finish, write_whole
from data.wording import COUNTS
from l2e.problems import Problem
from l2e.progress import Progress

CHUNK = 2**24  # bytes, or entries of an index, in memory at a time


def join(prefixes: list[str], output: str, limits: Limits) -> dict:
    """Write PREFIX.bin, .idx, .manifest.json, ... of all shares, in the shares' own order.

    Byte for byte what preparing all the sources at once writes. Returns the manifest. Raises
    ValueError where a share is missing, there twice, damaged or of other sources, and where all
    of them together are above the limits.
    """
    manifests = _in_order(prefixes)
    whole = _Whole.of(manifests)

    def fill(partial: PartialCorpus) -> None:
        partial.start_anew()
        _append(manifests, whole, partial)
        Judge(partial, whole.sources, limits, output).look(len(whole.sources))
        first = next(iter(manifests.values()))
        about = {key: first[key] for key in KEPT}
        finish(partial, whole.sources, {**about, "job": whole.job})

    return write_whole(output, whole.job, fill, {"join": whole.job})


# What the manifest of every share says alike, in the order of a manifest.
KEPT = (
    *("dtype", "tokenizer_path", "tokenizer_sha256", "tokenizer_vocab_size"),
    *("end_of_text", "end_of_text_token", "passed_over"),
)


class _File(BaseModel):
    """Hash of a file that several shares have parts of, and of each part."""

    sha256: str
    parts: list[str]


class _Facts(BaseModel):
    number: PositiveInt
    of: PositiveInt
    lines: dict[str, int]
    files: dict[str, _File]


class _JobShare(BaseModel):
    number: PositiveInt
    of: PositiveInt
    sources: list[tuple[str, str, int]]


class _Job(BaseModel):
    end_of_text: int
    tokenizer: str
    fields: dict[str, str]
    sources: list[tuple[str, str, str]]
    share: _JobShare


class _Entry(BaseModel):
    name: str
    sha256: str
    documents: int
    rejects: int


class _Counts(BaseModel):
    documents: int
    tokens: int


class _Rejects(BaseModel):
    total: int
    reasons: dict[str, int]


class _Wording(BaseModel):
    characters: int
    unknown_ids: int
    unknown_characters: int
    empty_documents: int
    end_of_text_ids: int
    example: str
    end_of_text_written_out: dict[str, int]
    spaces: dict[str, str]


class _Share(BaseModel):
    """What joining reads in the manifest of a share, beside what every manifest has."""

    dtype: Literal["uint16", "int32"]
    tokenizer_vocab_size: int
    end_of_text: int
    end_of_text_token: str
    passed_over: dict[str, list[str]]
    share: _Facts
    job: _Job
    sources: list[_Entry]
    subsets: dict[str, _Counts]
    rejects: _Rejects
    wording: _Wording


def _read(prefix: str) -> dict:
    """A share's manifest. Raises ValueError where it is none, or was not left as it was written."""
    found = manifest.read(prefix)
    if found is None or "share" not in found:
        reason = "is no finished share" if found is None else "is a whole corpus, no share"
        fix = "name what prepare.py --shard K/N --output wrote"
        raise Problem("join", Path(prefix), reason, fix)
    try:
        _Share.model_validate_json(json.dumps(found), strict=True)
        wrong = _contradictions(prefix, found)
    except ValidationError as report:
        wrong = [".".join(map(str, error["loc"])) for error in report.errors()]
    if wrong:
        reason = f"is not as it was written (damaged or missing: {', '.join(wrong[:5])})"
        raise Problem("manifest", manifest.path(prefix), reason, "prepare that share again")
    return found


def _contradictions(prefix: str, share: dict) -> list[str]:
    """The entries that other entries, or the token files, don't agree with."""
    of, entries = share["job"]["share"], [entry["name"] for entry in share["sources"]]
    inputs = {name for name, _, _ in of["sources"]}
    with idx_path(prefix).open("rb") as file:
        documents = HEADER.unpack(file.read(HEADER.size))[3]
    tokens = bin_path(prefix).stat().st_size / np.dtype(share["dtype"]).itemsize
    totals = {key: share[key] for key in ("documents", "tokens")}
    subsets, sources = share["subsets"].values(), share["sources"]
    agree = {
        "share": all(share["share"][key] == of[key] for key in ("number", "of")),
        "documents": share["documents"] == documents == sum(e["documents"] for e in sources),
        "tokens": share["tokens"] == tokens,
        "tokenizer_sha256": share["tokenizer_sha256"] == share["job"]["tokenizer"],
        "end_of_text": share["end_of_text"] == share["job"]["end_of_text"],
        "subsets": totals == {key: sum(counts[key] for counts in subsets) for key in totals},
        "sources": len({*entries}) == len(entries) and {*entries} <= inputs,
        "rejects": share["rejects"]["total"] == sum(entry["rejects"] for entry in sources),
    }
    return [key for key, agrees in agree.items() if not agrees]


def _in_order(prefixes: list[str]) -> dict[str, dict]:
    """{prefix: manifest} of all shares. Raises ValueError where they aren't those of one corpus."""
    twice = [prefix for prefix, count in Counter(prefixes).items() if count > 1]
    if twice:
        raise Problem("join", Path(twice[0]), "is named twice", "name each share once")
    shares: dict[str, dict] = {}
    for prefix in prefixes:
        shares[prefix] = _read(prefix)
    shares = dict(sorted(shares.items(), key=lambda item: item[1]["share"]["number"]))
    first = next(iter(shares))
    expected = _common(shares[first])
    for prefix, share in shares.items():
        changed = [key for key, value in _common(share).items() if expected[key] != value]
        if changed:
            reason = f"differs from {first} in {', '.join(changed)}"
            fix = "prepare all shares by one command, but for --shard and --output"
            raise Problem("join", Path(prefix), reason, fix)
    of = shares[first]["share"]["of"]
    numbers = Counter(share["share"]["number"] for share in shares.values())
    wrong = {number: numbers[number] for number in range(1, of + 1) if numbers[number] != 1}
    if wrong:
        times = ", ".join(f"{number} ({count} times)" for number, count in wrong.items())
        reason = f"of {of} shares, each needed once, are not there once: {times}"
        raise Problem("join", None, reason, "name the output of every --shard")
    return shares


def _common(share: dict) -> dict:
    """What has to be alike in all shares."""
    job, of = share["job"], share["job"]["share"]
    return {
        "the inputs": of["sources"],
        "the number of shares": of["of"],
        "the tokenizer": job["tokenizer"],
        "the end of text": job["end_of_text"],
        "the fields": job["fields"],
    }


@dataclass
class _Whole:
    """All sources together, as one preparation sees them."""

    sources: list[Source] = field(default_factory=list)
    job: dict = field(default_factory=dict)
    given: list[Given] = field(default_factory=list)

    @classmethod
    def of(cls, manifests: dict[str, dict]) -> "_Whole":
        """Put together from the shares' manifests. Raises ValueError where a file was changed
        between two of them."""
        first = next(iter(manifests.values()))
        whole = cls()
        entries: dict[str, list[tuple[str, dict]]] = {}
        for prefix, share in manifests.items():
            for entry in share["sources"]:
                entries.setdefault(entry["name"], []).append((prefix, entry))
        hashes = []
        for name, format_, _ in first["job"]["share"]["sources"]:
            parts = entries.get(name, [])
            known = manifests[parts[0][0]]["share"]["files"].get(name) if parts else None
            count = len(known["parts"]) if known else 1
            if len(parts) != count:
                reason = f"{len(parts)} of the {count} parts of {name} are in the shares' manifests"
                raise Problem("join", None, reason, "prepare the share that lacks it again")
            hash_ = parts[0][1]["sha256"]
            if known:
                hash_ = known["sha256"]
                for (prefix, part), expected in zip(parts, known["parts"], strict=True):
                    if part["sha256"] != expected:
                        reason = f"was made of another {name} than {parts[0][0]}"
                        raise Problem("join", Path(prefix), reason, "prepare that share again")
            whole.sources.append(Source(name, format_))
            hashes.append([Path(name).name, format_, hash_])
            whole.given.append(
                Given(sum(e["documents"] for _, e in parts), sum(e["rejects"] for _, e in parts))
            )
        job = {key: value for key, value in first["job"].items() if key != "share"}
        whole.job = {key: hashes if key == "sources" else value for key, value in job.items()}
        return whole


def _append(manifests: dict[str, dict], whole: _Whole, partial: PartialCorpus) -> None:
    """Everything the shares hold, one after the other."""
    total = sum(bin_path(prefix).stat().st_size for prefix in manifests)
    partial.files = dict(enumerate(whole.given))
    lines: Counter[str] = Counter()  # of each file, in the shares before
    with Progress(total=total, desc="joining", unit="B", unit_scale=True) as progress:
        for prefix, share in manifests.items():
            _append_tokens(prefix, share, partial, progress)
            _append_documents(prefix, share, partial)
            _append_rejects(prefix, share, lines, partial)
            _add_counts(share, partial)
            lines.update(share["share"]["lines"])


def _append_tokens(prefix: str, share: dict, partial: PartialCorpus, progress: Progress) -> None:
    digest = hashlib.sha256()
    with bin_path(prefix).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            partial.append(TOKENS, chunk)
            progress.update(len(chunk))
    if digest.hexdigest() != share["bin_sha256"] or sha256(idx_path(prefix)) != share["idx_sha256"]:
        reason = "is not what its manifest says it is"
        raise Problem("join", Path(prefix), reason, "prepare that share again")


def _append_documents(prefix: str, share: dict, partial: PartialCorpus) -> None:
    """Lengths, and subsets with the numbers they have in the whole."""
    names = list(share["subsets"])
    for name, counts in share["subsets"].items():
        known = partial.subsets.setdefault(name, [len(partial.subsets), 0, 0])
        known[1] += counts["documents"]
        known[2] += counts["tokens"]
    numbers = np.array([partial.subsets[name][0] for name in names], np.int32)
    own = Subsets(prefix).number_of_each(share["documents"])
    for lengths, start in _lengths(prefix, share["documents"]):
        partial.append(LENGTHS, lengths)
        partial.append(SUBSETS, numbers[own[start : start + len(lengths)]])


def _lengths(prefix: str, documents: int) -> Iterator[tuple[np.ndarray, int]]:
    """A share's lengths, some at a time, and where they begin; a share may have no documents."""
    with idx_path(prefix).open("rb") as file:
        file.seek(HEADER.size)
        for start in range(0, documents, CHUNK):
            yield np.fromfile(file, np.int32, min(CHUNK, documents - start)), start


def _append_rejects(prefix: str, share: dict, lines: Counter[str], partial: PartialCorpus) -> None:
    """Rejects, their lines counted from the beginning of the file instead of the share's part."""
    if not share["rejects"]["total"]:
        return
    for reject in _rejects(Path(f"{prefix}.{REJECTS}"), lines):
        partial.append(REJECTS, (json.dumps(reject, ensure_ascii=True) + "\n").encode())


def _rejects(path: Path, lines: Counter[str]) -> Iterator[dict]:
    """A share's rejects one by one. Raises ValueError where they cannot be read."""
    try:
        with path.open("rb") as file:
            for line in file:
                reject = json.loads(line)
                reject["line"] += lines[reject["source"]]
                yield reject
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"cannot be read as a share's rejects ({error})"
        raise Problem("join", path, reason, "prepare that share again") from None


def _add_counts(share: dict, partial: PartialCorpus) -> None:
    wording = share["wording"]
    partial.documents += share["documents"]
    partial.tokens += share["tokens"]
    partial.text_bytes += share["text_bytes"]
    partial.units += share["documents"] + share["rejects"]["total"]
    partial.reasons.update(share["rejects"]["reasons"])
    partial.said.update({name: wording[name] for name in COUNTS})
    partial.inside.update(wording["end_of_text_written_out"])
    partial.example = partial.example or wording["example"]
    for kind, example in wording["spaces"].items():
        partial.spaces.setdefault(kind, example)
