"""`make docs`: the pages that are written from the code itself.

    python docs/build.py [FOLDER]

Writes docs/configuration.md from the configuration's schema and docs/api/ from l2e's docstrings.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from configs import Config
from configs.loading import keys

INTRODUCTION = """# Configuration

Written by `make docs` from the schema; do not edit. One JSON file has these sections;
`--set section.key=value` overrides one key, `python launch/pretrain.py --help-config` prints this
text. Unknown keys are refused with the nearest known one, and all mistakes of a file are listed at
once.
"""


def main() -> None:
    """Write every page under docs/, or under the folder that the command line names."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    (output / "configuration.md").write_text(configuration(), encoding="utf-8")
    write_api(output / "api")


def configuration() -> str:
    """A table for each section: key, type, default, meaning with its unit."""
    lines, section = [INTRODUCTION.rstrip()], ""
    for key in keys():
        if key.section != section:
            section = key.section
            lines += ["", f"## {section}", "", f"{Config.model_fields[section].description}.", ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        leaf = key.name.rpartition(".")[2]
        cells = [f"`{leaf}`", f"`{key.type}`", f"`{key.default}`", key.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_api(folder: Path) -> None:
    """l2e's public modules, a page each."""
    import pdoc

    import l2e

    for name in l2e.__all__:
        getattr(l2e, name)  # imported when asked for; pdoc shows what is there
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    pdoc.pdoc("l2e", "!l2e.triton_kernels", output_directory=folder)


if __name__ == "__main__":
    main()
