"""One function per figure: arrays and tables in, a matplotlib `Figure` out. Only `save` writes, and
nothing here needs pyplot.

Colours are Okabe and Ito's (2008, *Color Universal Design*), told apart under every common colour
blindness; a line style or a marker always says the same a second time, so that a figure reads in
gray. Widths are those of a journal's one or two columns."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from lib.data import phantom
from lib.paths import atomic_write

COLUMN_INCHES = {1: 3.4, 2: 7.0}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ARM_TITLES = {"alexnet": "AlexNet, rotation augmentation", "p4m": "P4M, no augmentation"}
GRAY, LIGHT, DARK = "#767676", "#D0D0D0", "#333333"
NO_FINDING = "No Finding"
FINDINGS = (*phantom.FINDINGS, NO_FINDING)

_RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.6,
    "legend.columnspacing": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": DARK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "text.hinting": "none",  # texts are as wide at a screen's resolution as in print, so none is cut off there
    "figure.dpi": 110,
    "svg.fonttype": "path",  # glyphs as outlines: nothing to install where the figure is read
    "svg.hashsalt": "equivariant-cxr-clustering",  # element ids from the content, not from chance
}


def context() -> AbstractContextManager:
    """Context (or decorator) with the look of all figures: matplotlib's defaults, whatever the user
    has set, plus this module's own.
    """
    return matplotlib.style.context(["default", _RC])


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write a figure as PNG (300 dpi) and SVG, each atomically; the same figure gives the same
    bytes.

    Parameters
    ----------
    figure : Figure
    path : Path
        Where to, without suffix: ``.png`` and ``.svg`` are appended.

    Returns
    -------
    list of Path
        The PNG and the SVG.

    Raises
    ------
    OSError
        Folder not writable or disk full (see `lib.paths.atomic_write`).
    """
    path = Path(path)
    written = []
    # no version, no date: they would change the bytes and say nothing of the figure
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        target = path.with_name(f"{path.name}.{suffix}")
        drawn = io.BytesIO()
        with context(), atomic_write(target) as handle:
            figure.savefig(drawn, format=suffix, dpi=300, metadata=metadata)
            handle.write(_stable_clips(drawn.getvalue()) if suffix == "svg" else drawn.getvalue())
        written.append(target)
    return written


def _stable_clips(svg: bytes) -> bytes:
    """An SVG whose clip paths are named by what stands in the file, each of them once.

    matplotlib names them by exact coordinates, of which the layout's solver does not settle the
    last bit: one figure in twenty would get another name for the same rectangle."""
    names: dict[bytes, bytes] = {}

    def rename(clip: re.Match[bytes]) -> bytes:
        name = b"p" + hashlib.sha256(clip[3]).hexdigest()[:10].encode()
        known = name in names.values()
        names[clip[2]] = name
        return b"" if known else clip[1] + name + clip[3]

    svg = re.sub(
        rb'( *<clipPath id=")(p[0-9a-f]{10})(">.*?</clipPath>\n)', rename, svg, flags=re.DOTALL
    )
    return re.sub(rb"(?<=url\(#)p[0-9a-f]{10}(?=\))", lambda use: names.get(use[0], use[0]), svg)


def show_in_notebooks(dpi: int = 90, colors: int = 64) -> None:
    """Make figures that end a cell appear as PNGs of few colours, so that a saved notebook stays
    small.

    Does nothing outside IPython.
    """
    try:
        shell = get_ipython()  # a builtin where IPython runs
    except NameError:
        return

    def png(figure: Figure) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        with context():
            figure.savefig(drawn, format="png", dpi=dpi)
        # Pillow's default cuts by numbers of pixels and gives the gray of letters the palette; thin
        # coloured lines then lose their colour
        few = (
            Image.open(drawn)
            .convert("RGB")
            .quantize(colors, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        )
        few.save(small, format="png", optimize=True)
        return small.getvalue()

    shell.display_formatter.formatters["image/png"].for_type(Figure, png)


# --------------------------------------------------------------------------------------------------


def new_figure(columns: int, height: float) -> Figure:
    if columns not in COLUMN_INCHES:
        raise ValueError(
            f"columns must be 1 ({COLUMN_INCHES[1]} in wide) or 2 ({COLUMN_INCHES[2]} in), got {columns!r}"
        )
    return Figure(figsize=(COLUMN_INCHES[columns], height), layout="constrained")


def finish(figure: Figure, dataset_label: str, *more: str) -> Figure:
    """Name the dataset, and what else a reader must know, in small gray print under the figure;
    then settle where things stand.
    """
    if not isinstance(dataset_label, str) or not dataset_label.strip():
        raise ValueError(
            f"dataset_label must name the dataset, e.g. 'synthetic phantom, 2,000 images', got {dataset_label!r}"
        )
    figure.supxlabel(
        "\n".join((dataset_label, *more)),
        x=0.01,
        ha="left",
        fontsize=6.5,
        color=GRAY,
        linespacing=1.35,
    )
    # constrained layout moves things a little at each drawing: kept as it is now, every copy of the
    # figure has the same bytes
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def arm_name(arm: str) -> str:
    """``"p4m-untrained"`` -> ``"P4M untrained"``."""
    backbone, _, variant = arm.replace("_", " ").partition("-")
    return f"{ARM_TITLES.get(backbone, backbone).split(',')[0]} {variant}".strip()


def arm_title(arm: str) -> str:
    return ARM_TITLES.get(arm, arm_name(arm))


def arm_order(given: Mapping) -> list[str]:
    """AlexNet left and P4M right whether or not there is a run of it, then any other arm in the
    order given.
    """
    return [*ARM_TITLES, *(arm for arm in given if arm not in ARM_TITLES)]


def absent(axes: Axes, text: str) -> None:
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GRAY, fontsize=7
    )


def legend_below(axes: Axes, inches: float, **kwargs) -> None:
    """Legend under the panel, `inches` below its lower edge, so that it hides no data."""
    offset = ScaledTranslation(0, -inches, axes.figure.dpi_scale_trans)
    if "handles" not in kwargs and not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axes.transAxes + offset,
        borderaxespad=0,
        **kwargs,
    )
