"""All figures: nothing is cut off or overlaps; how they look, and how they are saved and shown."""

import builtins
import io
import itertools
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.colors import to_rgb
from PIL import Image

from lib.plots import atlas, claims, data, pipeline, style, training
from tests import figures as made
from tests.drawing import drawn_texts, said
from tests.figures import ANGLES, LABEL, PUBLISHED, RUNS

IMAGES, FINDINGS = made.xrays()
CHANCE = {"alexnet": 0.04, "p4m": 0.05}
TURNS = {name: {"ami": ANGLES / 400, "distance": ANGLES / 300} for name in made.arms()}
RATES = {name: {"macro": [0, 0.6, 1], "micro": [0, 0.7, 1]} for name in (*made.arms(), "guess")}
FOUND = {name: np.array([[1, 2, 3, -1], [4, 5, 6, 7]]) for name in ("alexnet", "p4m")}
TABLES = {name: made.enrichment() for name in ("alexnet", "p4m")}
CONTROLS = {**RUNS, "p4m-index": RUNS["p4m"], "p4m-shuffled": RUNS["alexnet"]}
CLASSES = {"one": {"p4m": made.classes()}, "one, turned": {"alexnet": made.classes()}, "none": {}}
UNKNOWN = {"age": np.nan, "sex": "", "view_position": "", "patient_id": ""}
ATLAS = [made.cluster(3), made.cluster(5)]
ROWS = FINDINGS, range(40), {"p4m": 0.01}, LABEL
FIGURES = {
    "pipeline": lambda: pipeline.pipeline(IMAGES[0], LABEL),
    "nmi": lambda: training.nmi_curves(RUNS, PUBLISHED, 0.22, LABEL),
    "nmi, four": lambda: training.nmi_curves(CONTROLS, PUBLISHED, 0.22, LABEL),
    "nmi, no run": lambda: training.nmi_curves({}, PUBLISHED, 0.22, LABEL),
    "loss": lambda: training.loss_curves(RUNS, PUBLISHED, 20, LABEL),
    "known classes": lambda: training.known_classes(CLASSES, LABEL, "digit"),
    "known classes, none": lambda: training.known_classes({}, LABEL, "digit"),
    "occupancy": lambda: training.occupancy(made.runs_table(), LABEL, 0.5),
    "tsne": lambda: training.tsne_maps(*made.maps(), LABEL),
    "tsne, no run": lambda: training.tsne_maps({}, {}, [], LABEL),
    "samples": lambda: training.samples(IMAGES, FINDINGS, LABEL),
    "samples, outlined": lambda: training.samples(IMAGES, FINDINGS, LABEL, effect=made.effect),
    "samples, no labels": lambda: training.samples(IMAGES, [""] * 40, LABEL),
    "clusters": lambda: training.clusters(IMAGES, IMAGES[:, 0, :3], np.arange(40) % 7, LABEL),
    "probes": lambda: training.probe_bars(made.probes(), LABEL),
    "cooccurrence": lambda: data.cooccurrence(FINDINGS, LABEL),
    "population": lambda: data.population(made.people(), LABEL),
    "population, unknown": lambda: data.population(made.people().assign(**UNKNOWN), LABEL),
    "mean images": lambda: data.mean_images(IMAGES, FINDINGS, LABEL),
    "mean images, no labels": lambda: data.mean_images(IMAGES, [""] * 40, LABEL),
    "brightness": lambda: data.brightness(IMAGES, (90.0, 150.0, 2.0), LABEL),
    "brightness of one": lambda: data.brightness(IMAGES[:1], (16.0, 239.0, 2.0), LABEL),
    "texture": lambda: data.texture_by_finding(made.textures(), LABEL),
    "sobel": lambda: data.sobel(IMAGES[:6], FINDINGS[:6], LABEL),
    "sobel of black": lambda: data.sobel(0 * IMAGES[:1], ["black"], LABEL),
    "forest": lambda: claims.forest(made.result()),
    "forest, one seed": lambda: claims.forest(made.result(1)),
    "forest, no pair": lambda: claims.forest({**made.result(), "comparisons": []}),
    "controls": lambda: claims.control_curves(CONTROLS, CHANCE, LABEL),
    "controls, no run": lambda: claims.control_curves({}, {}, LABEL),
    "roc": lambda: claims.roc(RATES, made.arms(), [0, 0.5, 1], LABEL, 321),
    "roc, nothing": lambda: claims.roc({}, {}, [], LABEL, 0),
    "invariance": lambda: claims.invariance(TURNS, made.arms(), ANGLES, LABEL, 96),
    "enrichment": lambda: claims.enrichment_maps(TABLES, LABEL),
    "enrichment, nothing": lambda: claims.enrichment_maps({}, LABEL),
    "retrieval": lambda: claims.retrieval_panels(IMAGES, [0, 9], FOUND, *ROWS),
    "retrieval, nothing": lambda: claims.retrieval_panels(IMAGES, [], {}, *ROWS),
    "atlas": lambda: next(atlas.pages(IMAGES, ATLAS, 40, "P4M", LABEL)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_names_its_data_and_no_text_is_cut_off_or_overlaps(name):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    assert dict(matplotlib.rcParams) == before, "the settings are the user's"
    assert LABEL in said(figure)
    assert figure.get_figwidth() in style.COLUMN_INCHES.values()
    shown = list(drawn_texts(figure).items())
    if name.startswith("tsne"):  # numbers of clusters may touch
        shown = [(text, box) for text, box in shown if not text.get_text().isdigit()]
    for (a, box_a), (b, box_b) in itertools.combinations(shown, 2):
        overlap = box_a.padded(-0.5).overlaps(box_b.padded(-0.5))
        assert not overlap, f"overlap: {a.get_text()!r} and {b.get_text()!r}"


def test_an_arm_looks_the_same_in_every_figure():
    for name, (color, marker) in {"alexnet": ("#0072B2", "o"), "p4m": ("#D55E00", "s")}.items():
        assert style.arm(name).line == {"color": color, "marker": marker}
    assert style.arm("my_arm-wide").title == "my arm, wide"
    assert style.arm_order(["p4", "p4m", "alexnet"]) == ["alexnet", "p4m", "p4"]
    for name in ("nmi", "loss", "known classes", "controls", "invariance", "roc", "probes"):
        colours = {line.get_color() for axes in FIGURES[name]().axes for line in axes.lines}
        assert style.arm("p4m").colour in colours, name


def test_labels_are_any_with_no_finding_first_and_an_epoch_that_is_there_twice_is_refused():
    assert style.label_names(["b|a", "No Finding", "", "a"]) == ["No Finding", "a", "b"]
    assert len(style.label_names([str(i) for i in range(30)])) == 24
    assert style.label_names([""]) == []
    with pytest.raises(ValueError, match="duplicate"):
        style.by_seed(pd.concat([RUNS["p4m"], RUNS["p4m"]]), "nmi_prev")


@pytest.mark.parametrize("name", ["pipeline", "nmi", "cooccurrence", "brightness", "atlas"])
def test_the_same_data_give_the_same_bytes(name, tmp_path):
    first = [path.read_bytes() for path in style.save(FIGURES[name](), tmp_path / "a")]
    # what a user has set changes nothing
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.facecolor": "pink"}):
        again = [path.read_bytes() for path in style.save(FIGURES[name](), tmp_path / "b")]
    assert first == again


def test_save_writes_300_dpi_and_self_contained_svg(tmp_path):
    png, svg = style.save(FIGURES["nmi"](), tmp_path / "new" / "fig1.v2_nmi")
    assert (png.name, svg.name) == ("fig1.v2_nmi.png", "fig1.v2_nmi.svg")
    with Image.open(png) as image:
        assert image.width == 990
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert "Software" not in image.info
    text = svg.read_text(encoding="utf-8")
    for absent in ("<text", "font-family", "<dc:date>"):  # glyphs are outlines
        assert absent not in text
    assert sorted(p.name for p in png.parent.iterdir()) == [png.name, svg.name]


@pytest.fixture
def shell(monkeypatch):
    """IPython, set as the notebooks set it."""
    shell = InteractiveShell()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    style.show_in_notebooks()
    return shell


def test_an_interrupted_cell_says_so_in_one_line(shell, capsys):
    assert isinstance(shell.run_cell("raise KeyboardInterrupt").error_in_exec, KeyboardInterrupt)
    assert re.fullmatch("KeyboardInterrupt: .*last whole epoch\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["nmi", "sobel"])
def test_notebooks_show_all_figures_alike_and_thin_lines_in_colour(name, shell):
    shown, _ = shell.display_formatter.format(FIGURES[name]())
    image = Image.open(io.BytesIO(shown["image/png"])).convert("RGB")
    assert image.width == {"nmi": 508, "sobel": 770}[name]
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    for color in style.PALETTE[:2] if name == "nmi" else ():
        assert np.abs(pixels - 255 * np.array(to_rgb(color))).max(axis=1).min() <= 24, color
