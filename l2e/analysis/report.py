"""One self-contained HTML page of results: figures embedded, tables, and the exact command."""

import html
from dataclasses import dataclass
from pathlib import Path

from l2e.analysis.analysis import Analysis, Result

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; display: block; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
.note { color: #555; }
@media (max-width: 60rem) { body { font-size: 14px; } th, td { padding: .2rem .3rem; } }
"""

INTRODUCTION = (
    "What follows measures one model, section by section: a sentence that reads the numbers, the "
    "numbers, and their figures. Each set of passages with a human-readable feature has its own "
    "sections. Read every number beside its control: random neurons, shuffled labels, killing at "
    "random, rescaled weights."
)


@dataclass(frozen=True)
class ReportSection:
    """One analysis of a report: where it was made, and its result or the reason why not."""

    analysis: Analysis
    where: str
    found: Result | str


def write_report(path: Path, title: str, sections: list[ReportSection], opening: str = "") -> Path:
    """Write the page. opening: what is seen, in words, before the first section."""
    from l2e.analysis.results import provenance

    results = [section.found for section in sections if isinstance(section.found, Result)]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(text)}</p>" for text in (opening, _subject(results)) if text),
        f"<p class='note'>{html.escape(INTRODUCTION)}</p>",
        *(part for section in sections for part in _section(section)),
        _origin(provenance()),  # one command made them all
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n</html>\n", "utf-8")
    return path


def _section(section: ReportSection) -> list[str]:
    title = f"{section.analysis.title}: {section.where}"
    head = f"<h2>{html.escape(title)}</h2>"
    if isinstance(section.found, str):
        return [head, f"<p>Not measured: {html.escape(section.found)}</p>"]
    values = section.found.values
    return [
        head,
        *(f"<p>{html.escape(note)}</p>" for note in section.analysis.notes(values)),
        *(f"<div class='wide'>{t._repr_html_()}</div>" for t in section.analysis.tables(values)),
        *(panel.html() for panel in section.found.plot()),
    ]


def _subject(results: list[Result]) -> str:
    """The model's size and the feature sets, as far as the results tell them."""
    values = [result.values for result in results]
    size = next((one["parameters"] for one in values if "parameters" in one), None)
    told = [] if size is None else [f"{size:,} parameters."]
    sets = {one["features"]["name"]: one["features"] for one in values if "features" in one}
    for name, features in sets.items():
        passages = features["passages"]
        told.append(f"{name}: {sum(passages.values()):,} passages of {len(passages)} features.")
    return " ".join(told)


def _origin(provenance: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return (
        f"<p class='note'><code>{html.escape(provenance['command'])}</code><br>"
        f"{provenance['date']}, {html.escape(provenance['machine'])}; {html.escape(versions)}</p>"
    )
