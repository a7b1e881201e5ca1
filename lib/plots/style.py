"""The look of all figures and the parts they share: arrays and tables in, a `Figure` out.

In all figures, `images` are uint8 (N, H, W), 0 to 255; `findings` are N texts, the labels of each
image joined by ``|``; `dataset_label` names the data in the small print. A figure is 3.3 in wide,
one column of a journal, or 7 in if it shows many images.
Colours are Okabe and Ito's (2008, *Color Universal Design*); a marker or a line style says the same
a second time, so that a figure reads in gray."""

import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lib.paths import atomic_write
from lib.study.arms import ARMS, Arm

COLUMN_INCHES = {1: 3.3, 2: 7.0}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", (0, (4, 1, 1, 1)), ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
GRAY, LIGHT, DARK = "#767676", "#D0D0D0", "#333333"
NO_FINDING = "No Finding"
CHANCE = {"color": GRAY, "linestyle": (0, (3, 1, 1, 1)), "linewidth": 0.8}
SEEDS = {"mean of the seeds": {"marker": "o"}, "one seed": {"linewidth": 0.5}}  # of `seed_lines`

# DejaVu comes with matplotlib: the same glyphs on every machine
_RC = {"font.family": "DejaVu Sans", "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7}
_RC |= {f"{part}.labelsize": 6 for part in ("xtick", "ytick")} | {"figure.titleweight": "bold"}
_RC |= {"figure.titlesize": 8, "legend.fontsize": 6, "legend.frameon": False}
_RC |= {"legend.handlelength": 2.2, "legend.handletextpad": 0.6, "legend.columnspacing": 1.2}
_RC |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": DARK}
_RC |= {"axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}
_RC |= {"xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.axisbelow": True}
_RC |= {"grid.color": "#E6E6E6", "grid.linewidth": 0.5, "lines.linewidth": 1.2}
# without hinting texts are as wide on a screen as in print, so none is cut off there
_RC |= {"lines.markersize": 3, "text.hinting": "none", "figure.dpi": 110}
# glyphs as outlines, so nothing must be installed to read them; ids from the content, not by chance
_RC |= {"svg.fonttype": "path", "svg.hashsalt": "equivariant-cxr-clustering"}


def arm(name: str) -> Arm:
    """How an arm is named and drawn in every figure; one that the study does not know is gray."""
    return ARMS.get(name) or Arm(name.replace("_", " ").replace("-", ", ", 1), GRAY, "X")


def arm_order(given: Iterable[str]) -> list[str]:
    """AlexNet, P4M, then the other arms in the order given."""
    return sorted(given, key=lambda name: {"alexnet": 0, "p4m": 1}.get(name, 2))


def context() -> AbstractContextManager:
    """Context (or decorator) with the look of all figures, whatever the user has set."""
    return matplotlib.style.context(["default", _RC])


def save(figure: Figure, path: Path | str, dpi: int = 300) -> list[Path]:
    """Write ``<path>.png`` and ``<path>.svg``, pictures in it at `dpi`, too; return both paths."""
    path, written = Path(path), []
    # no version, no date: they would change the bytes and say nothing of the figure
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        written.append(path.with_name(f"{path.name}.{suffix}"))
        with context(), atomic_write(written[-1]) as handle:
            figure.savefig(handle, format=suffix, dpi=dpi, metadata=metadata)
    return written


def show_in_notebooks(dpi: int = 110, colors: int = 64) -> None:
    """Show figures that end a cell as PNGs of few colours, so that a saved notebook stays small.
    `dpi` is of a figure 7 in wide; narrower ones get up to 1.4 times as much. A cell that is
    interrupted says so in one line. Only in IPython."""
    try:
        shell = get_ipython()  # a builtin in IPython
    except NameError:
        return

    pd.options.display.max_columns = 20  # as if pandas had been imported in a kernel

    def png(figure: Figure) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        with context():
            scale = np.clip(COLUMN_INCHES[2] / figure.get_figwidth(), 1, 1.4)
            figure.savefig(drawn, format="png", dpi=dpi * scale)
        few = _few_colours(Image.open(drawn).convert("RGB"), colors)
        few.save(small, format="png", optimize=True)
        return small.getvalue()

    def interrupted(shell, kind, error, trace, tb_offset=None) -> None:
        text = "KeyboardInterrupt: run the cell again; training goes on after the last whole epoch"
        error._render_traceback_ = lambda: [text]  # IPython's own way; else 40 lines of frames
        shell.showtraceback((kind, error, trace))

    shell.display_formatter.formatters["image/png"].for_type(Figure, png)
    shell.set_custom_exc((KeyboardInterrupt,), interrupted)


def _few_colours(image: Image.Image, colors: int) -> Image.Image:
    """Half of the palette is grays, so that X-rays stay smooth; the rest are the picture's colours.
    Pillow's default cuts by numbers of pixels: thin coloured lines then lose their colour."""
    pixels, half = np.asarray(image), colors // 2  # (H, W, 3)
    coloured = np.ptp(pixels.astype(int), axis=2) > 12  # (H, W)
    index = np.round(pixels.mean(axis=2) * ((half - 1) / 255)).astype(np.uint8)
    palette = np.linspace(0, 255, half).round().astype(int).repeat(3).tolist()
    if coloured.any():
        found = Image.fromarray(pixels[coloured][None])
        found = found.quantize(colors - half, Image.Quantize.FASTOCTREE)
        index[coloured] = half + np.asarray(found)[0]
        palette += found.getpalette()
    few = Image.fromarray(index)
    few.putpalette(palette)
    return few


# --- parts of figures -----------------------------------------------------------------------------


def new_figure(height: float, title: str, columns: int = 1) -> Figure:
    """A figure one or two columns wide; `height` (inches) is without legend and small print."""
    figure = Figure(figsize=(COLUMN_INCHES[columns], height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def finish(figure: Figure, dataset_label: str, *notes: str) -> Figure:
    """Add the small print, dataset first, below all else, and settle the layout."""
    width, height = figure.get_size_inches()
    texts = (textwrap.wrap(text, int(23 * width)) for text in (dataset_label, *notes))
    lines = [line for text in texts for line in text]
    foot = 0.11 * len(lines) + 0.06
    below = foot + sum(legend.get_window_extent().height for legend in figure.legends) / figure.dpi
    height += below
    figure.set_figheight(height)
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - below / height))
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0.5, foot / height), figure.transFigure)
    small = {"fontsize": 6, "color": GRAY, "linespacing": 1.25, "va": "bottom"}
    figure.text(0.01, 0.03 / height, "\n".join(lines), **small)
    # constrained layout moves things a little at each drawing, and does not settle the last bit
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position(original=True).bounds, 5))
    return figure


def legend_below(figure: Figure, keys: Mapping[str, Mapping], ncols: int = 2, **look) -> None:
    """One legend for the whole figure, from labels and the looks of their lines."""
    keys = {label: {"color": DARK, **line} for label, line in keys.items()}
    handles = [Line2D([], [], label=label, **line) for label, line in keys.items()]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=ncols, **look)


def epoch_panels(figure: Figure, names: Sequence[str]) -> dict[str, Axes]:
    """At most two panels per row, titled with arms or other names, with epochs below."""
    rows, columns = max(-(-len(names) // 2), 1), min(max(len(names), 1), 2)
    grid = blank_panels(figure, rows, columns, sharey=True).ravel()
    panels = dict(zip(names, grid, strict=False))
    for name, axes in panels.items():
        axes.set_axis_on()
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axes.set(xlabel="epoch", title=arm(name).heading)
    return panels


def blank_panels(figure: Figure, rows: int, columns: int, **look) -> np.ndarray:
    """A grid (rows, columns) of panels without axes, for pictures."""
    grid = figure.subplots(rows, columns, squeeze=False, **look)
    for axes in grid.flat:
        axes.set_axis_off()
    return grid


def rows_of(axes: Axes, names: Sequence[str], none: str = "") -> None:
    """Names one below the other as the y axis, the first at the top; `none` says why there are
    none."""
    if none and not names:
        return absent(axes, none)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), ylabel="")
    axes.tick_params(axis="y", length=0)


def absent(axes: Axes, text: str) -> None:
    """Say in the middle of an empty panel why it is empty."""
    look = {"ha": "center", "va": "center", "color": GRAY, "fontsize": 6}
    axes.set(xticks=[], xlabel="")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, **look)


def picture(axes: Axes, image: np.ndarray, title: str = "", **look) -> Any:
    """A gray image (H, W), 0 to 255, without axes."""
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=6, pad=2)
    return axes.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 255, **look})


def frame(axes: Axes, color: str, width: float, line: str = "-") -> None:
    """A frame around a picture."""
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=color, linewidth=width, linestyle=line)


def seeds_per_arm(counts: Iterable[int]) -> str:
    """``"seeds per arm: 1 to 5"``."""
    counts = [int(n) for n in counts] or [0]
    return f"seeds per arm: {' to '.join(str(n) for n in sorted({min(counts), max(counts)}))}"


def shown(name: str) -> str:
    """A label as it is printed."""
    return name.replace("_", " ") or "not stated"


def label_names(findings: Iterable[str]) -> list[str]:
    """The 24 most frequent labels: No Finding first, as the reference, then by name."""
    counts = Counter(name for text in findings for name in dict.fromkeys(text.split("|")) if name)
    names = [name for name, _ in counts.most_common(24)]
    return sorted(names, key=lambda name: (name != NO_FINDING, name))


def members(findings: Sequence[str]) -> dict[str, np.ndarray]:
    """Which images have each of `label_names`, bool (N,); ``""`` if none has any."""
    parts = [set(text.split("|")) for text in findings]
    names = label_names(findings) or [""]
    return {name: np.array([name in part for part in parts], dtype=bool) for name in names}


def by_seed(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """`column` as epoch x seed, without the epochs at which no seed has a value."""
    return table.pivot(index="epoch", columns="seed", values=column).dropna(how="all")


def seed_lines(axes: Axes, table: pd.DataFrame, **look) -> None:
    """Each seed of an epoch x seed table as a thin line, and their mean as a thick one."""
    if table.shape[1] > 1:
        axes.plot(table.index, table, **{**look, "marker": "", "linewidth": 0.5, "alpha": 0.6})
    mean_line(axes, table, **look)


def mean_line(axes: Axes, table: pd.DataFrame, **look) -> None:
    """The mean over the seeds, of the epochs that all seeds have."""
    axes.plot(table.dropna().mean(axis=1), **look)
