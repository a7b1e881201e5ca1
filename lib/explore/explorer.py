"""A page on which to look around in finished runs: maps, clusters, galleries, epochs and turned
images, in one file without a server. ``explorer.html`` holds what the browser does. All X-rays
shown are in the page as one picture: it is as private as they are."""

import base64
import html as html_module
import io
import json
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Model
from bokeh.plotting import figure
from bokeh.resources import Resources
from PIL import Image
from skimage.util import montage
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from lib import paths
from lib.data import embeddings, finding_matrix, label_set
from lib.features import PCAWhiten, extract
from lib.images import SYMMETRIES, moved
from lib.parallel import resolve_device
from lib.plots import style
from lib.runs import Run, assign, embed, load_model
from lib.study import clusters, given, measure, report

MOST_IMAGES = 10_000  # every browser can draw a picture of 6,400 pixels, which holds so many
MOST_BYTES = 15_000_000
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "star", "hex")
TURNS = ("as it is", "90° left", "180°", "90° right")  # lib.images.SYMMETRIES
TURNS += ("left to right", "diagonal", "top to bottom", "other diagonal")
TEXTS = {"image_id": "ids", "patient_id": "patients", "view_position": "views", "sex": "sexes"}
_TOOLTIP = """
<div style="display:flex;gap:8px;font:12px sans-serif;max-width:320px">
  <div style="flex:none;width:64px;height:64px;background-image:var(--sprite);
    background-position:@position;display:@picture"></div>
  <div><b>@id</b><br>@findings<br>patient @patient, @view<br>cluster @cluster</div>
</div>
"""


def gather(
    images, metadata, runs, dataset_label, attribution, n_images=2000, seed=0, look=None
) -> dict:
    """Compute what the page shows: plain values, and ``pixels``, uint8 (M, 64, 64).

    `images` are uint8 (N, 64, 64); `metadata` has image_id, findings, and patient_id,
    view_position, age and sex if known; `runs` map arms to finished runs of these images. At most
    `n_images` are shown, a random choice by `seed`, which is also that of t-SNE; clusters are
    followed and tested for findings on all images. ValueError without a run, for a run of another
    number of images, or `n_images` out of range.

    For embeddings (N, D) in the place of `images`, `look` is a function from rows (M,) to pictures,
    (M, 64, 64), and which there are, bool (M,). A run has an ``embedding`` then, and no network."""
    if not runs:
        raise ValueError("there is no run to explore: runs is empty")
    if not 4 <= n_images <= MOST_IMAGES:
        raise ValueError(f"n_images must be 4 to {MOST_IMAGES:,}, got {n_images}")
    for arm, run in runs.items():
        n = len(run.final_assignments)
        if not len(images) == len(metadata) == n:
            raise ValueError(f"run {arm!r} clustered {n} images, there are {len(images)}")
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:n_images])
    shown = metadata.iloc[rows]
    pixels, pictured = look(rows) if look else (images[rows], np.ones(len(rows), bool))
    names = {name: name.replace("_", " ") for name in label_set(metadata)}
    known = clusters.attributes(images, metadata)
    known = {title: known[name] for name, title in names.items() if name in known}
    has = finding_matrix(shown["findings"], tuple(names))
    texts = shown.reindex(columns=[*TEXTS], fill_value="").fillna("").astype(str)
    ages = shown["age"] if "age" in shown else [np.nan] * len(rows)
    found = {"label": dataset_label, "attribution": attribution, "total": len(images)}
    found |= {"turns": TURNS[: 1 if look else None], "finding_names": list(names.values())}
    found |= {"pixels": pixels, "pictured": pictured.tolist()}
    found |= texts.rename(columns=TEXTS).to_dict("list")
    found["ages"] = [int(age) if np.isfinite(age) else None for age in ages]
    found["labelled"] = (shown["findings"] != "").tolist()
    found["findings"] = [np.flatnonzero(row).tolist() for row in has]
    arms = [_arm(arm, run, pixels, rows, known, seed) for arm, run in runs.items()]
    return found | {"arms": arms}


def _arm(arm: str, run: Run, pixels: np.ndarray, rows: np.ndarray, known: Mapping, seed) -> dict:
    """What the page shows of one run, of the images in `rows`, which have these `pixels`."""
    trained = isinstance(run, Run)
    embedding = embed(run, np.asarray(run.features)) if trained else run.embedding
    epochs = clusters.follow(np.vstack([run.assignments, run.final_assignments[None]]))
    turned = [run.final_assignments[rows].tolist()]
    if trained:
        device = resolve_device(run.config.device)
        model = load_model(run, device)
        for symmetry in SYMMETRIES[1:]:
            features = extract(model, moved(pixels, *symmetry), device=device)
            turned.append(assign(run, features).tolist())
    table = clusters.enrichment(run.final_assignments, known)
    table["q"] = [float(f"{q:.2g}") for q in table["q"]]
    perplexity = min(30, (len(rows) - 1) / 3)
    x, y = _flat(embedding[rows], perplexity, seed).T
    stability = clusters.stability(epochs).round(3).astype(object)
    found = {"name": arm, "title": style.arm(arm).title, "seed": run.config.seed}
    found |= {"perplexity": round(perplexity), "x": x.tolist(), "y": y.tolist(), "turned": turned}
    return found | {
        "epochs": epochs[:, rows].tolist(),
        "distance": [_distance(embedding, labels)[rows].tolist() for labels in epochs],
        "stability": np.where(pd.isna(stability), None, stability).tolist(),
        "q": table.pivot(index="cluster", columns="property", values="q").to_dict("index"),
    }


def _flat(points: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE of points (M, d), between -1 and 1."""
    start = "pca" if points.shape[1] > 1 else "random"
    with threadpool_limits(1, user_api="openmp"):  # the same on every machine
        tsne = TSNE(perplexity=perplexity, init=start, random_state=seed)
        flat = tsne.fit_transform(points.astype(np.float64))
    flat -= (flat.max(axis=0) + flat.min(axis=0)) / 2
    return np.round(flat / (np.abs(flat).max() or 1), 4)


def _distance(embedding: np.ndarray, assignments: np.ndarray) -> np.ndarray:
    """Distance (N,) of each final embedding to the mean of its cluster, in thousandths."""
    means = pd.DataFrame(embedding).groupby(assignments).transform("mean").to_numpy()
    return np.round(1000 * np.linalg.norm(embedding - means, axis=1)).astype(int)


def sprite(images: np.ndarray) -> tuple[bytes, int]:
    """Images, uint8 (M, 64, 64), row by row in one JPEG, and how many are in a row. 64 is a
    multiple of the 8 pixels of a JPEG block: no image runs into its neighbour."""
    sheet, out = montage(images, fill=0), io.BytesIO()
    Image.fromarray(sheet).save(out, "JPEG", quality=85, optimize=True)
    return out.getvalue(), sheet.shape[1] // images.shape[2]


def _map() -> Model:
    """The empty map; the page fills its sources."""
    rings = ("x", "y", "size", "color")
    names = (*rings, "marker", "alpha", "id", "findings", "patient", "view", "cluster")
    names += ("position", "picture")
    source = ColumnDataSource({name: [] for name in names}, name="points")
    marks = ColumnDataSource({name: [] for name in rings}, name="marks")
    area = {"width": 600, "aspect_ratio": 1, "sizing_mode": "scale_width"}
    area |= {"x_range": (-1.08, 1.08), "y_range": (-1.08, 1.08)}
    tools = {"tools": "pan,wheel_zoom,box_zoom,tap,reset", "toolbar_location": "above"}
    tools["active_scroll"] = None  # a wheel over the map scrolls the page until its tool is chosen
    plot = figure(name="map", outline_line_color=style.LIGHT, **area, **tools)
    look = {"fill_alpha": "alpha", "fill_color": "color", "line_alpha": "alpha"}
    look |= {"line_color": "white", "line_width": 0.4, "marker": {"field": "marker"}}
    dots = plot.scatter("x", "y", size="size", source=source, **look)
    dots.selection_glyph = dots.nonselection_glyph = dots.glyph
    ring = {"fill_alpha": 0, "line_color": "color", "line_width": 2.2}
    plot.scatter("x", "y", marker="circle", size="size", source=marks, **ring)
    hover = HoverTool(renderers=[dots], tooltips=_TOOLTIP, point_policy="snap_to_data", limit=1)
    plot.add_tools(hover)
    plot.axis.visible = plot.grid.visible = False
    plot.toolbar.logo = None
    return plot


def html(content: Mapping) -> str:
    """The page, from what `gather` computed."""
    sheet, columns = sprite(content["pixels"])
    payload = {key: value for key, value in content.items() if key != "pixels"}
    payload |= {"columns": columns, "sprite": base64.b64encode(sheet).decode()}
    payload |= {"palette": style.PALETTE, "light": style.LIGHT, "gray": style.GRAY}
    payload["markers"] = MARKERS
    parts = {"DATA": _script_json(payload), "PLOT": _script_json(json_item(_map()))}
    parts["TITLE"] = html_module.escape(f"Explorer: {content['label']}")
    parts["BOKEH"] = Resources(mode="inline", components=["bokeh"]).render_js()
    page = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], page)


def _script_json(value) -> str:
    """JSON for a script element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def save(content: Mapping, path: Path | str) -> Path:
    """Write the page, with a warning if it is larger than 15 MB."""
    path, text = Path(path), html(content)
    if len(text) > MOST_BYTES:
        size = f"{path.name} has {len(text) / 1e6:.0f} MB and is slow to open"
        warnings.warn(f"{size}; lower n_images", stacklevel=2)
    with paths.atomic_write(path, "w") as handle:
        handle.write(text)
    return path


def of_file(path: Path | str, dataset: str, preset: Mapping) -> str:
    """`lib.study.given.measure_file`, and beside its files the page ``explorer.html`` of the first
    seed, with the pictures that `lib.data.embeddings.pictures` finds. Returns its text, raises its
    errors."""
    text, seed = given.measure_file(path, dataset, preset), preset["seeds"][0]
    points, metadata = embeddings.load(paths.dataset_dir(dataset))
    found = np.load(paths.run_dir(dataset, "given", seed) / measure.ANSWERS)["final"]
    whitened = PCAWhiten(min(preset["pca_dim"], *points.shape)).fit_transform(points)
    run = SimpleNamespace(config=SimpleNamespace(seed=seed), embedding=whitened)
    run.assignments, run.final_assignments = found[None][:0], found  # there are no epochs
    notes = report.dataset_label("embeddings", len(points)), embeddings.ATTRIBUTION
    look = partial(embeddings.pictures, path)
    content = gather(points, metadata, {"given": run}, *notes, look=look)
    return f"{text}, {save(content, paths.figures_dir(dataset) / 'explorer.html')}"
