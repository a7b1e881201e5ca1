"""The method at a glance, drawn by hand: coordinates are inches from the lower left corner."""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from lib.plots.style import COLUMN_INCHES, DARK, GRAY, PALETTE, context

BLUE, RED = PALETTE[:2]
BOLD = {"fontweight": "bold", "fontsize": 7}
HEAD = {"ha": "left", **BOLD}
TEXTS = (  # x, y, words, look
    (0.61, 3.16, "chest X-ray", BOLD),
    (0.61, 1.86, "64 × 64 pixels\nno labels are read", {}),
    (1.44, 3.56, "AlexNet with rotation augmentation", {"color": BLUE, **HEAD}),
    (1.87, 2.7, "random rotations", {}),
    (3.04, 2.7, "fixed Sobel filters", {}),
    (4.4, 2.7, "5 convolutions", {}),
    (5.22, 2.7, "2 dense", {}),
    (1.44, 2.36, "P4M-equivariant CNN, no augmentation", {"color": RED, **HEAD}),
    (2.12, 1.5, "8 poses of each filter", {}),
    (3.78, 1.5, "3 group convolutions", {}),
    (5.05, 1.5, "maximum over poses,\nmean over space", {"fontsize": 6}),
    (6.48, 3.14, "features", BOLD),
    (6.48, 1.94, "N images × D", {}),
    (1.84, 1.19, "train with a new top layer (D to K), then repeat; one loop per backbone", HEAD),
)
ARROWS = (  # colour, corners
    (BLUE, (1.12, 2.6), (1.19, 2.6), (1.19, 3.1), (1.45, 3.1)),
    (BLUE, (2.32, 3.1), (2.52, 3.1)),
    (BLUE, (3.56, 3.1), (3.76, 3.1)),
    (BLUE, (5.83, 3.1), (5.96, 3.1), (5.96, 2.66), (6.1, 2.66)),
    (RED, (1.12, 2.42), (1.19, 2.42), (1.19, 1.92), (1.46, 1.92)),
    (RED, (2.86, 1.92), (3.06, 1.92)),
    (RED, (4.46, 1.92), (4.66, 1.92)),
    (RED, (5.83, 1.92), (5.96, 1.92), (5.96, 2.36), (6.1, 2.36)),
    (DARK, (6.5, 1.84), (6.5, 1.13)),
    (DARK, (1.75, 1.1), (1.75, 1.27)),
)
STEPS = ("PCA", "whitening", "L2 norm", "K-means", "pseudo-labels", "cross-entropy")


def _box(axes: Axes, x: float, y: float, width: float, height: float, edge: str, **look):
    style = {"boxstyle": "round,pad=0,rounding_size=0.07", "linewidth": 0.8, "facecolor": "white"}
    axes.add_patch(FancyBboxPatch((x, y), width, height, edgecolor=edge, **{**style, **look}))


def _block(axes: Axes, x: float, y: float, width: float, height: float, color: str, **look):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **{"zorder": 3, **look}))


def _arrow(axes: Axes, color: str, *corners: tuple[float, float], width: float = 1.1):
    axes.plot(*zip(*corners[:-1], strict=True), color=color, linewidth=width, zorder=4)
    look = {"arrowstyle": "-|>", "mutation_scale": 3 + 5 * width, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(*corners[-2:], color=color, linewidth=width, zorder=4, **look))


def _text(axes: Axes, x: float, y: float, words: str, **look):
    middle = {"ha": "center", "va": "center", "fontsize": 6.5, "linespacing": 1.15, "zorder": 6}
    axes.text(x, y, words, **{**middle, **look})


def _picture(axes: Axes, values: np.ndarray, x: float, y: float, side: float, **look):
    look = {"cmap": "gray", "interpolation": "bicubic", "zorder": 3, **look}
    axes.imshow(values, extent=(x, x + side, y, y + side), **look)


def _networks(axes: Axes, gray: np.ndarray) -> None:
    """Turned copies, edges and layers of AlexNet; a filter in 8 poses and layers of P4M."""
    for place, angle in enumerate((-20, 75, 160)):
        turned = ndimage.rotate(gray, angle, reshape=False, order=1)
        where = (1.5 + 0.17 * place, 3.0 - 0.055 * place, 0.42)
        _picture(axes, turned, *where, vmin=0, vmax=255, zorder=3 + 0.1 * place)
    for place, axis in enumerate((1, 0)):
        edges = ndimage.sobel(ndimage.gaussian_filter(gray, 0.7), axis=axis)
        limit = np.percentile(np.abs(edges), 99)
        _picture(axes, edges, 2.57 + 0.48 * place, 2.87, 0.45, vmin=-limit, vmax=limit)
    for place, height in enumerate((0.6, 0.46, 0.36, 0.36, 0.3, 0.52, 0.52)):
        width, alpha = (0.13, 0.35) if place < 5 else (0.06, 0.8)
        _block(axes, 3.84 + 0.245 * place, 3.1 - height / 2, width, height, BLUE, alpha=alpha)
    corner = np.zeros((5, 5))
    corner[:3, 2], corner[2, 2:], corner[3, 4] = 3, (3, 3, 2), 1
    look = {"cmap": "Oranges", "vmin": -0.5, "vmax": 4, "interpolation": "nearest"}
    for pose in range(8):
        mirror, turns = divmod(pose, 4)
        weights = np.rot90(np.fliplr(corner) if mirror else corner, turns)
        _picture(axes, weights, 1.5 + 0.32 * turns, 1.94 - 0.32 * mirror, 0.28, **look)
        edge = {"edgecolor": RED, "linewidth": 0.4, "zorder": 4 - 0.1 * pose}
        for place, (width, height) in enumerate(((0.07, 0.44), (0.09, 0.34), (0.12, 0.24))):
            x, y = 3.14 + 0.44 * place + 0.028 * pose, 1.86 - height / 2 + 0.018 * pose
            _block(axes, x, y, width, height, "#F2C5A0", **edge)
    funnel = [(4.74, 2.2), (4.74, 1.64), (5.02, 1.8), (5.02, 2.04)]
    axes.add_patch(Polygon(funnel, facecolor=RED, alpha=0.35, zorder=3))
    _block(axes, 5.1, 1.8, 0.06, 0.24, RED, alpha=0.8)


def _clustering(axes: Axes) -> None:
    """The steps of an epoch, computed on 90 toy points, from right to left: the loop closes."""
    noise = np.random.default_rng(4).normal(0, 0.42, (90, 2))
    points = np.repeat([[-1.5, -0.4], [0.5, 1.1], [1.2, -0.9]], 30, axis=0) + noise
    rotated = PCA(2).fit_transform(points @ [[1.5, 0.85], [0.1, 0.55]])
    white = rotated / rotated.std(0)
    unit = normalize(white)
    found = KMeans(3, n_init=1, random_state=0).fit(unit)
    colors, side, bottom = np.array(PALETTE[2:5]), 0.74, 0.36
    middles = [(6.5 - 0.95 * step, bottom + side / 2) for step in range(6)]
    for (x, _), name in zip(middles, STEPS, strict=True):
        _box(axes, x - side / 2, bottom, side, side, GRAY, zorder=2)
        _text(axes, x, bottom - 0.12, name, fontweight="bold")
    for (start, y), (stop, _) in pairwise(middles):
        _arrow(axes, DARK, (start - side / 2 - 0.02, y), (stop + side / 2 + 0.03, y))
    clouds = ((rotated, DARK), (white, DARK), (unit, DARK), (unit, colors[found.labels_]))
    for (values, color), middle in zip(clouds, middles, strict=False):
        x, y = (middle + values / np.abs(values).max() * 0.3).T
        axes.scatter(x, y, s=3.2, c=color, linewidths=0, zorder=5)
    axes.add_patch(Circle(middles[2], 0.3, fill=False, edgecolor=GRAY, linewidth=0.4, zorder=4))
    cross = {"s": 24, "marker": "X", "edgecolors": "black", "linewidths": 0.8, "zorder": 6}
    axes.scatter(*(middles[3] + 0.3 * found.cluster_centers_).T, c=colors, **cross)
    for row, (cluster, share) in enumerate(zip((1, 0, 2), (0.62, 0.2, 0.12), strict=True)):
        x, y = middles[4][0] - 0.17, bottom + 0.585 - 0.215 * row
        _text(axes, x, y, f"$x_{row + 1}$")
        _arrow(axes, DARK, (x + 0.1, y), (x + 0.24, y), width=0.6)
        _block(axes, x + 0.27, y - 0.075, 0.15, 0.15, colors[cluster])
        _text(axes, x + 0.345, y - 0.005, str(cluster + 1), fontsize=6)
        _block(axes, 1.48, bottom + 0.52 - 0.15 * row, 0.8 * share, 0.1, colors[cluster])
    _text(axes, 1.75, bottom + 0.1, r"$-\ln\, p_{\mathrm{label}}$")


@context()
def pipeline(image: np.ndarray, dataset_label: str) -> Figure:
    """The method at a glance: two backbones, one clustering loop. Every small picture is computed,
    from the square `image`, uint8 (H, H), or from toy points."""
    figure = Figure(figsize=(COLUMN_INCHES[2], 3.75))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _box(axes, 1.27, 1.29, 4.54, 2.43, GRAY, linestyle="--", zorder=0)
    _box(axes, 1.34, 2.56, 4.4, 1.1, BLUE, facecolor="#EFF5FA")
    _box(axes, 1.34, 1.36, 4.4, 1.1, RED, facecolor="#FCF3EC")
    _picture(axes, image, 0.12, 2.02, 0.98, vmin=0, vmax=255)
    _networks(axes, np.asarray(image, dtype=np.float64))
    _clustering(axes)
    numbers = {"vmin": -0.3, "vmax": 1.2, "interpolation": "nearest"}
    _picture(axes, np.random.default_rng(1).random((8, 6)), 6.12, 2.16, 0.76, **numbers)
    for x, y, words, look in TEXTS:
        _text(axes, x, y, words, **look)
    for arrow in ARROWS:
        _arrow(axes, *arrow)
    source = f"X-ray: {dataset_label}; dots: toy data"
    _text(axes, 0.1, 0.08, source, ha="left", color=GRAY, fontsize=6)
    axes.set(xlim=(0, COLUMN_INCHES[2]), ylim=(0, 3.75))
    return figure
