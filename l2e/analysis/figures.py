"""How the analyses draw: panels in one style, as PNG bytes for a notebook, a file or a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

STYLE: Any = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a feature's name is drawn as it is written, dollars and all
}
COLOURS = 48  # of a picture: a third of the bytes, and hardly seen
DOTS_PER_INCH = 100


@dataclass(frozen=True)
class Panel:
    """One figure of one pair of axes, `width` by `height` inches; `words`: names that it shows."""

    name: str
    draw: Callable[[Axes], None]
    width: float = 8
    height: float = 5
    words: tuple[str, ...] = ()

    @cached_property
    def image(self) -> Image:
        """The picture, drawn once."""
        import matplotlib
        from matplotlib.figure import Figure
        from PIL import Image

        letters = "".join(sorted({letter for word in self.words for letter in word}))
        with matplotlib.rc_context({**STYLE, "font.family": families(letters)}):
            figure = Figure(figsize=(self.width, self.height))
            self.draw(figure.subplots())
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=DOTS_PER_INCH)
        return few_colours(Image.open(drawn))

    def png(self) -> bytes:
        written = io.BytesIO()
        self.image.save(written, "PNG", optimize=True)
        return written.getvalue()

    def html(self) -> str:
        return embedded(self.name, self.image)

    _repr_png_ = png


class Panels(list[Panel]):
    """An analysis's figures; a notebook shows them all."""

    def save(self, folder: Path) -> list[Path]:
        """Each as folder/NAME.png."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{panel.name}.png" for panel in self]
        for path, panel in zip(paths, self, strict=True):
            path.write_bytes(panel.png())
        return paths

    def _repr_html_(self) -> str:
        return "".join(panel.html() for panel in self)


def colours(name: str, count: int, most: float = 1.0) -> np.ndarray:
    """`count` colours of the map `name`, [count, 4]."""
    import matplotlib

    return matplotlib.colormaps[name](np.linspace(0, most, count))


def over_steps(axes: Axes) -> None:
    """A horizontal axis of training steps, from 0 on and logarithmic from 1 on."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("step")


def few_colours(image: Image) -> Image:
    """The image with a palette of its COLOURS most telling ones."""
    from PIL.Image import Dither

    return image.convert("RGB").quantize(COLOURS, dither=Dither.NONE)


def embedded(name: str, image: Image) -> str:
    """An image as a part of a page: WebP, which is smaller than PNG and as exact."""
    written = io.BytesIO()
    image.convert("RGB").save(written, "WEBP", lossless=True, quality=100, method=4)
    data = base64.b64encode(written.getvalue()).decode()
    return f"<img alt='{html.escape(name)}' src='data:image/webp;base64,{data}'>"


@cache
def families(text: str) -> list[str]:
    """Fonts that have the letters of `text`: the usual one, and others of this machine's where
    it lacks some. What no font has is told, once, and drawn as a box."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    usual = "DejaVu Sans"
    found, missing = [usual], {letter for letter in text if not letter.isspace()}
    missing -= _letters(FT2Font(font_manager.findfont(usual)), missing)
    for font in font_manager.fontManager.ttflist if missing else ():
        if "Last Resort" in font.name or "Color" in font.name:
            continue  # has a box for everything; has bitmaps, which matplotlib can't draw
        has = _letters(FT2Font(font.fname), missing)
        if has:
            found.append(font.name)
            missing -= has
    if missing:
        letters = ", ".join(f"{letter} (U+{ord(letter):04X})" for letter in sorted(missing))
        print(f"no font of this machine has {letters}: drawn as boxes")
    return found


def _letters(font: Any, wanted: Iterable[str]) -> set[str]:
    """Those of `wanted` that the font has."""
    has = font.get_charmap()
    return {letter for letter in wanted if ord(letter) in has}
