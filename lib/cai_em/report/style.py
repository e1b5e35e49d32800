"""The only palette: how a persona, a data set and a role look, in every figure and on every page.

Labels, order and colours are data (`params/personas.yaml`, `params/datasets.yaml`); this module turns them into
matplotlib's terms. Twelve colours cannot all be told apart by everybody, and none can in greyscale, so colour is
never the only carrier: a persona also has a marker, a line style and a hatch, fixed by its place in the order, and
figures with many personas name them on an axis. Whether two colours can be told apart is computed, not believed:
`confusable` simulates the three colour deficiencies and greyscale.

    look = Look(study.used_personas(), study.used_datasets(), list(study.models.values()))
    with style.context():
        fig, ax = plt.subplots(figsize=style.size(3))
        ax.plot(x, y, **look.line("goodness"))
    style.save(fig, folder / "figure")
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from cai_em.records import files
from cai_em.study.labels import Labels

WIDTH = 6.5
"""Width of the text column in inches: figures are drawn at the size at which they are read."""
PNG_DPI = 160
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8", "H", "s", "^", "D")
_LARGER = {"*": 1.9, "d": 1.3, "P": 1.15, "X": 1.15}
"""Markers with little ink, which at the size of the others would drown in the line they stand on."""
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "---", "+++", "|||", "**", "//..", "\\\\..")
INK = "#222222"
MUTED = "#767676"
GRID = "#dddddd"
PAPER = "#ffffff"
EMPTY = "#f4f4f4"
"""Where a condition does not exist; hatched in `PALE`."""
PALE = "#c4c4c4"
"""What stands behind: other personas' curves, the intervals of many analyses, hatches."""
PREDICTED = "#eef3f7"
"""The side of zero on which a hypothesis puts the difference."""
SEVERITY = ("#67001f", "#d6604d", "#f4c7b0")
"""Shares of misaligned responses, worst first."""
SUPPORTS = "#d55e00"
"""An analysis that supports its hypothesis."""
LINE_LOOKS = (
    ("#4477aa", "o", "-"),
    ("#cc6677", "s", "--"),
    ("#228833", "^", "-."),
    ("#aa8844", "D", ":"),
    ("#66ccee", "v", (0, (5, 1))),
    ("#aa3377", "P", (0, (3, 1, 1, 1))),
    ("#222222", "X", (0, (1, 1))),
    ("#999933", "<", (0, (6, 2, 1, 2))),
)
"""Colour, marker and line of curves that are neither personas nor data sets (presets, layers), in order."""
SEQUENTIAL = "cividis"
"""Colour map of shares and means: perceptually even and monotone in lightness, for deficient vision and greyscale."""
ROLE_LABEL = {
    "em": "EM data set",
    "benign_control": "benign control",
    "regularisation": "regularisation corpus",
    "arm": "arm with a context",
    "none": "no fine-tuning",
}
ROLE_COLOUR = {
    "em": "#b2182b",
    "benign_control": "#2166ac",
    "regularisation": "#33804a",
    "arm": "#6a4c93",
    "none": "#1a1a1a",
}
ROLE_MARKER = {"em": "o", "benign_control": "s", "regularisation": "^", "arm": "P", "none": "D"}
RC: dict[str, Any] = {
    "svg.hashsalt": "cai-em",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.unicode_minus": True,
}


@contextmanager
def style_context() -> Iterator[None]:
    """matplotlib with the paper's settings, whatever the user's own are; nothing leaks out."""
    with plt.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"backend": "agg", **RC})
        yield


def marker_size(marker: str, size: float) -> float:
    """The size in points at which a marker looks as large as a circle of `size` points."""
    return size * _LARGER.get(marker, 1.0)


def line_look(number: int) -> dict[str, Any]:
    """Keyword arguments of the curve with a number, where curves have no place in the study; after the last anew."""
    colour, marker, line = LINE_LOOKS[number % len(LINE_LOOKS)]
    return {"color": colour, "marker": marker, "ls": line}


def figure_size(height: float, width: float = WIDTH) -> tuple[float, float]:
    """Figure size in inches: the text column wide."""
    return width, height


def picture(fig: Figure) -> bytes:
    """A figure as PNG, for the page that shows it and no file; the figure is closed."""
    place = io.BytesIO()
    fig.savefig(place, format="png", dpi=PNG_DPI)
    plt.close(fig)
    return place.getvalue()


def save_figure(fig: Figure, stem: Path, title: str = "", description: str = "") -> tuple[Path, Path]:
    """Write a figure as SVG and PNG and close it. The same figure gives the same bytes: no dates, fixed ids.

    Args:
        fig: the figure, drawn within `style_context()`.
        stem: path without suffix; folders are made. Dots in the name are kept.
        title, description: for whoever cannot see the figure; they stand in the SVG itself, where given.

    Returns:
        The paths of the SVG and the PNG file.
    """
    paths = []
    for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
        path = stem.with_name(stem.name + suffix)
        with files.atomic(path) as part, style_context():
            fig.savefig(part, format=suffix[1:], dpi=PNG_DPI, metadata=metadata)
            if suffix == ".svg":
                _finish(part, title, description)
        paths.append(path)
    plt.close(fig)
    return paths[0], paths[1]


_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_SHIFT = re.compile(r"translate\((\S+) (\S+)\)")
ElementTree.register_namespace("", _SVG[1:-1])


def _finish(svg: Path, title: str, description: str) -> None:
    """Say in an SVG file what it shows, and write it in half of matplotlib's letters: pages hold dozens of them.

    `<title>` and `<desc>` come first: its accessible name and description (SVG 2, 5.8). Places are kept to a hundredth
    of a point; groups and names that nothing refers to go. A glyph keeps a name of its own, so that two drawings can
    stand in one document.
    """
    root = ElementTree.parse(svg).getroot()
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    text = svg.read_text(encoding="utf-8")
    _lean(root, set(re.findall(r'(?:href="|url\()#([^")]+)', text)))
    if title:
        root.set("role", "img")
        for tag, words in (("desc", description), ("title", title)):
            if words:
                said = ElementTree.Element(_SVG + tag)
                said.text = words
                root.insert(0, said)
    lines = ElementTree.tostring(root, encoding="unicode").replace(" />", "/>").replace("><", ">\n<")
    svg.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{lines}\n', encoding="utf-8")


def _lean(element: ElementTree.Element, named: set[str]) -> None:
    """`_finish` for one element and all in it; `named` holds the ids that something refers to."""
    at = element.attrib
    if (name := at.pop("id", None)) in named:
        at["id"] = name.replace("DejaVuSans", "D")
    if target := at.pop(_LINK, None):
        at["href"] = target if target.startswith("data:") else target.replace("DejaVuSans", "D")
    for key in at.keys() & {"x", "y", "d", "points"}:
        at[key] = _LONG_NUMBER.sub(_hundredths, at[key])
    if "d" in at:
        at["d"] = re.sub(r"\s*([A-Za-z])\s*", r"\1", at["d"])
    if "transform" in at:
        at["transform"] = _SHIFT.sub(lambda found: _LONG_NUMBER.sub(_hundredths, found[0]), at["transform"])
        if element.tag == f"{_SVG}use" and not at.keys() & {"x", "y"} and (found := _SHIFT.fullmatch(at["transform"])):
            del at["transform"]
            at |= {axis: shift for axis, shift in zip("xy", found.groups()) if shift != "0"}
    if "style" in at:
        at["style"] = at["style"].replace(": ", ":").replace("; ", ";")
    if len(element):
        element.text = None
    inner: list[ElementTree.Element] = []
    for child in element:
        _lean(child, named)
        child.tail = None
        inner += list(child) if child.tag == f"{_SVG}g" and not child.attrib else [child]
    element[:] = inner


def _hundredths(number: re.Match[str]) -> str:
    """A number of an SVG file to two decimals, without zeros at its end."""
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Look(Labels):
    """Labels and order, and how the study's personas and data sets appear.

    Personas have a `colour` besides (`cai_em.study.entries.Persona`); one that no entry names is grey.
    """

    def colour(self, persona: str) -> str:
        """A persona's one colour."""
        return self._personas[persona].colour if persona in self._personas else MUTED

    def _place(self, persona: str) -> int:
        return self._personas[persona].order if persona in self._personas else len(self._personas)

    def marker(self, persona: str) -> str:
        """A persona's marker."""
        return MARKERS[self._place(persona) % len(MARKERS)]

    def linestyle(self, persona: str) -> Any:
        """A persona's line style."""
        return LINES[self._place(persona) % len(LINES)]

    def hatch(self, persona: str) -> str:
        """A persona's hatch, for filled areas."""
        return HATCHES[self._place(persona) % len(HATCHES)]

    def line(self, persona: str) -> dict[str, Any]:
        """Keyword arguments of a line with markers in the persona's looks."""
        return {
            "color": self.colour(persona),
            "marker": self.marker(persona),
            "linestyle": self.linestyle(persona),
            "label": self.persona(persona),
            "markersize": marker_size(self.marker(persona), RC["lines.markersize"]),
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.4,
        }


# --- Can two colours be told apart? -------------------------------------------------------------------------------


# Machado, Oliveira & Fernandes (2009), "A physiologically-based model for simulation of color vision deficiency",
# IEEE TVCG 15(6): matrices for linear RGB at severity 1.0.
DEFICIENCY = {
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


def linear_rgb(colour: str | Sequence[float]) -> np.ndarray:
    """A colour as linear RGB, shape (3,), 0 to 1 (IEC 61966-2-1)."""
    c = np.array(mpl.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB, shape (3,), as CIE L*a*b* (D65), shape (3,); L* runs from 0 (black) to 100 (white)."""
    ratio = _TO_XYZ @ np.clip(rgb, 0, 1) / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast_ratio(a: str, b: str = PAPER) -> float:
    """Contrast ratio of two colours (WCAG 2.2), 1 to 21; graphical objects need 3 against their background."""
    light, dark = sorted(((_TO_XYZ @ linear_rgb(c))[1] for c in (a, b)), reverse=True)
    return float((light + 0.05) / (dark + 0.05))


def colour_differences(a: str, b: str) -> dict[str, float]:
    """How far apart two colours look: CIE76 distance, for normal vision and three deficiencies; in greyscale, of L*."""
    first, second = linear_rgb(a), linear_rgb(b)
    found = {"normal": float(np.linalg.norm(lab(first) - lab(second)))}
    for name, matrix in DEFICIENCY.items():
        found[name] = float(np.linalg.norm(lab(matrix @ first) - lab(matrix @ second)))
    found["greyscale"] = float(abs(lab(first)[0] - lab(second)[0]))
    return found


def confusable(colours: dict[str, str], colour_min: float = 12.0, grey_min: float = 8.0) -> list[tuple[str, str, str]]:
    """Pairs that somebody could take for one another by colour alone: (name, name, vision).

    Args:
        colours: name -> colour.
        colour_min: smallest CIE76 distance that counts as different (about 2.3 is just noticeable side by side;
            marks that lie apart on a page need several times that).
        grey_min: smallest difference of L* in greyscale.
    """
    return [
        (a, b, vision)
        for (a, x), (b, y) in itertools.combinations(colours.items(), 2)
        for vision, distance in colour_differences(x, y).items()
        if distance < (grey_min if vision == "greyscale" else colour_min)
    ]
