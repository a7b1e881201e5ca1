"""A page on which to look around in finished runs: maps, clusters, galleries, epochs and turned
images, in one file without a server.

`gather` computes what the page shows, `html` makes the page, `save` writes it. Plots are Bokeh's,
with its script inside the file; what is done in the browser stands in ``explorer.html`` beside this
module. All X-rays shown lie in the page as one picture: it is as private as they are."""

from __future__ import annotations

import base64
import html as html_module
import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Model, Range1d, Span
from bokeh.plotting import figure
from bokeh.resources import Resources
from PIL import Image
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from lib.data import FINDINGS, finding_matrix
from lib.deepcluster import resolve_device
from lib.features import extract
from lib.groups import P4M
from lib.paths import atomic_write
from lib.plots.style import ARM_TITLES, DARK, GRAY, LIGHT, PALETTE
from lib.runs import Run, assign, embed, load_model
from lib.study import atlas, enrichment

MOST_IMAGES = (
    10_000  # the picture of all X-rays is then 6,400 pixels wide, which every browser can draw
)
MOST_BYTES = 15_000_000
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "star", "hex")
TURNS = (
    "as it is",
    "90° left",
    "180°",
    "90° right",
    "top to bottom",
    "diagonal",
    "left to right",
    "other diagonal",
)  # P4M's elements
_TOOLTIP = """
<div style="display:flex;gap:8px;font:12px sans-serif;max-width:320px">
  <div style="flex:none;width:64px;height:64px;background-image:var(--sprite);background-position:@position"></div>
  <div><b>@id</b><br>@findings<br>patient @patient, @view<br>cluster @cluster</div>
</div>
"""


def gather(
    images: np.ndarray,
    metadata: pd.DataFrame,
    runs: Mapping[str, Run],
    dataset_label: str,
    attribution: str,
    n_images: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute what the page shows.

    Parameters
    ----------
    images : uint8, shape (N, 64, 64)
    metadata : DataFrame, N rows
        image_id, patient_id, findings, view_position, and age and sex if known.
    runs : mapping of arm to Run
        Finished runs of these images, at least one.
    dataset_label : str
        Names the dataset.
    attribution : str
        Of the images.
    n_images : int
        Images shown, at most: a random choice. Clusters are followed and tested for findings on all
        images.
    seed : int
        Of the choice and of t-SNE.

    Returns
    -------
    dict
        Plain values, and ``pixels``, uint8 (M, 64, 64).

    Raises
    ------
    ValueError
        No run, a run of another number of images, or `n_images` out of range.
    """
    if not runs:
        raise ValueError("there is no run to explore: runs is empty")
    if not 4 <= n_images <= MOST_IMAGES:
        raise ValueError(f"n_images must be 4 to {MOST_IMAGES:,}, got {n_images}")
    for arm, run in runs.items():
        if not len(images) == len(metadata) == len(run.final_assignments):
            counts = f"{len(images)} images, {len(metadata)} rows of metadata, {len(run.final_assignments)} assignments"
            raise ValueError(f"run {arm!r} is of another data set: {counts}")
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:n_images])
    some, shown = np.asarray(images[rows]), metadata.iloc[rows]
    findings = finding_matrix(shown["findings"])
    columns = {
        name: shown[name].fillna("").astype(str).tolist() if name in shown else [""] * len(rows)
        for name in ("image_id", "patient_id", "view_position", "sex")
    }
    ages = shown["age"].tolist() if "age" in shown else [np.nan] * len(rows)
    known = {
        name: has
        for name, has in enrichment.attributes(images, metadata).items()
        if has[0] == enrichment.CLINICAL
    }
    return {
        "label": dataset_label,
        "attribution": attribution,
        "total": len(images),
        "ids": columns["image_id"],
        "patients": columns["patient_id"],
        "views": columns["view_position"],
        "sexes": columns["sex"],
        "ages": [None if not np.isfinite(age) else int(age) for age in ages],
        "labelled": (shown["findings"].fillna("") != "").astype(int).tolist(),
        "findings": (findings @ (1 << np.arange(len(FINDINGS)))).tolist(),
        "finding_names": [name.replace("_", " ") for name in FINDINGS],
        "turns": TURNS,
        "arms": [_arm(arm, run, some, rows, known, seed) for arm, run in runs.items()],
        "pixels": some,
    }


def _arm(
    arm: str,
    run: Run,
    images: np.ndarray,
    rows: np.ndarray,
    known: Mapping[str, tuple[str, np.ndarray, np.ndarray]],
    seed: int,
) -> dict[str, Any]:
    embedding = embed(run, np.asarray(run.features))
    epochs = atlas.follow(np.vstack([run.assignments, run.final_assignments[None]]))
    points = embedding[rows].astype(np.float64)
    perplexity = min(30, (len(rows) - 1) / 3)
    with threadpool_limits(
        1, user_api="openmp"
    ):  # on one thread the same on every machine, and no waiting for a busy core each step
        map_ = TSNE(
            perplexity=perplexity,
            init="pca" if points.shape[1] > 1 else "random",
            random_state=seed,
        ).fit_transform(points)
    map_ -= (map_.max(axis=0) + map_.min(axis=0)) / 2
    map_ /= np.abs(map_).max() or 1.0
    distance = np.stack([_distance(embedding, labels)[rows] for labels in epochs])
    device = resolve_device(run.config.device)
    model = load_model(run, device)
    turned = [run.final_assignments[rows].tolist()]
    for g in range(1, P4M.order):
        acted = np.ascontiguousarray(P4M.act_on_grid(torch.from_numpy(np.array(images)), g).numpy())
        turned.append(assign(run, extract(model, acted, device=device)).tolist())
    table = enrichment.enrichment(run.final_assignments, known)
    places = {name: FINDINGS.index(name) for name in known}
    q: dict[str, dict[str, float]] = {}
    for row in table.itertuples():
        q.setdefault(str(row.cluster), {})[str(places[row.property])] = float(f"{row.q:.2g}")
    return {
        "name": arm,
        "title": ARM_TITLES.get(arm, arm),
        "seed": run.config.seed,
        "perplexity": round(perplexity),
        "n_clusters": int(epochs.max()) + 1,
        "x": np.round(map_[:, 0], 4).tolist(),
        "y": np.round(map_[:, 1], 4).tolist(),
        "epochs": epochs[:, rows].tolist(),
        "distance": np.round(1000 * distance).astype(int).tolist(),
        "stability": [
            [None if np.isnan(v) else round(float(v), 3) for v in line]
            for line in atlas.stability(epochs)
        ],
        "turned": turned,
        "q": q,
    }


def _distance(embedding: np.ndarray, assignments: np.ndarray) -> np.ndarray:
    """Distance of each image's final embedding to the mean of its cluster's."""
    k = int(assignments.max()) + 1
    total = np.zeros((k, embedding.shape[1]))
    np.add.at(total, assignments, embedding)
    centroids = total / np.maximum(np.bincount(assignments, minlength=k), 1)[:, None]
    return np.linalg.norm(embedding - centroids[assignments], axis=1)


def sprite(images: np.ndarray, quality: int = 85) -> tuple[bytes, int]:
    """All images in one JPEG, row by row, and how many stand in a row: uint8 (M, 64, 64).

    64 is a multiple of the 8 pixels of a JPEG block: no image runs into its neighbour.
    """
    m, height, width = images.shape
    columns = int(np.ceil(np.sqrt(m)))
    lines = -(-m // columns)
    sheet = np.zeros((lines * columns, height, width), np.uint8)
    sheet[:m] = images
    sheet = (
        sheet.reshape(lines, columns, height, width)
        .swapaxes(1, 2)
        .reshape(lines * height, columns * width)
    )
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue(), columns


def _map() -> Model:
    names = (
        "x",
        "y",
        "color",
        "marker",
        "size",
        "alpha",
        "id",
        "findings",
        "patient",
        "view",
        "cluster",
        "position",
    )
    source = ColumnDataSource({name: [] for name in names}, name="points")
    marks = ColumnDataSource({"x": [], "y": [], "size": [], "color": []}, name="marks")
    plot = figure(
        name="map",
        sizing_mode="scale_width",
        aspect_ratio=1,
        width=600,
        x_range=Range1d(-1.08, 1.08),
        y_range=Range1d(-1.08, 1.08),
        tools="pan,wheel_zoom,box_zoom,tap,reset",
        active_scroll=None,  # a wheel over the map scrolls the page until its tool is chosen
        toolbar_location="above",
    )
    look = {
        "fill_alpha": "alpha",
        "fill_color": "color",
        "line_color": "white",
        "line_width": 0.4,
        "line_alpha": "alpha",
    }
    dots = plot.scatter("x", "y", marker={"field": "marker"}, size="size", source=source, **look)
    dots.selection_glyph = dots.nonselection_glyph = dots.glyph
    plot.scatter(
        "x",
        "y",
        marker="circle",
        size="size",
        source=marks,
        fill_alpha=0,
        line_color="color",
        line_width=2.2,
    )
    hover = HoverTool(renderers=[dots], tooltips=_TOOLTIP, point_policy="snap_to_data", limit=1)
    plot.add_tools(hover)
    plot.axis.visible = False
    plot.grid.visible = False
    plot.outline_line_color = LIGHT
    plot.toolbar.logo = None
    return plot


def _stability() -> Model:
    source = ColumnDataSource({"epoch": [], "cluster": [], "median": []}, name="stability")
    plot = figure(
        name="stability-plot",
        sizing_mode="stretch_width",
        height=170,
        x_range=Range1d(0.5, 2.5),
        y_range=Range1d(0, 1.05),
        tools="",
        toolbar_location=None,
    )
    plot.line(
        "epoch",
        "median",
        source=source,
        color=GRAY,
        line_dash="dashed",
        line_width=1.5,
        legend_label="median of all clusters",
    )
    plot.line(
        "epoch",
        "cluster",
        source=source,
        color=PALETTE[0],
        line_width=2.5,
        legend_label="this cluster",
    )
    plot.scatter("epoch", "cluster", source=source, color=PALETTE[0], size=6)
    plot.add_layout(
        Span(name="now", location=1, dimension="height", line_color=PALETTE[1], line_width=1.5)
    )
    plot.xaxis.axis_label = "epoch"
    plot.yaxis.axis_label = "best Jaccard"
    plot.xaxis.ticker.min_interval = 1
    plot.legend.location = "top_left"
    plot.legend.label_text_font_size = "9px"
    plot.legend.background_fill_alpha = 0.6
    plot.legend.padding = 2
    return plot


def html(content: Mapping[str, Any]) -> str:
    """The page, from what `gather` computed."""
    sheet, columns = sprite(content["pixels"])
    payload = {key: value for key, value in content.items() if key != "pixels"}
    payload |= {
        "columns": columns,
        "sprite": base64.b64encode(sheet).decode(),
        "palette": PALETTE,
        "markers": MARKERS,
    }
    payload |= {"light": LIGHT, "gray": GRAY, "dark": DARK}
    plots = {"map": json_item(_map()), "stability": json_item(_stability())}
    parts = {
        "TITLE": html_module.escape(f"Explorer: {content['label']}"),
        "BOKEH": Resources(mode="inline", components=["bokeh"]).render_js(),
        "DATA": _script_json(payload),
        "PLOTS": _renumbered(_script_json(plots)),
    }
    page = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    found = [head]
    for piece in rest:  # once through: what is put in is not looked at again
        name, tail = piece.split("}}", 1)
        found += [parts[name.strip()], tail]
    return "".join(found)


def _renumbered(plots: str) -> str:
    """Bokeh counts its models through the life of a process; numbered from 1 the same page has the
    same bytes.
    """
    ids: dict[str, str] = {}
    return re.sub(
        r'"p\d+"', lambda found: ids.setdefault(found.group(), f'"p{len(ids) + 1}"'), plots
    )


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def save(content: Mapping[str, Any], path: Path | str) -> Path:
    """Write the page.

    Warns
    -----
    UserWarning
        It is larger than 15 MB.

    Raises
    ------
    OSError
        Folder not writable or disk full.
    """
    path, text = Path(path), html(content)
    if len(text) > MOST_BYTES:
        warnings.warn(
            f"{path.name} is {len(text) / 1e6:.0f} MB large and slow to open; lower n_images",
            stacklevel=2,
        )
    with atomic_write(path, "w") as handle:
        handle.write(text)
    return path
