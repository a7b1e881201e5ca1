"""Figures: what they say, that nothing is cut off, and that the same data give the same bytes."""

import builtins
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

from lib import paths
from lib.plots import style, training
from tests.drawing import drawn_texts

LABEL = "synthetic phantom, 2,000 images"
PUBLISHED_DIR = paths.ROOT / "data" / "published"
PUBLISHED = pd.read_csv(PUBLISHED_DIR / "curves.csv")


def metrics(n_seeds=3, n_epochs=6, level=0.6):
    generator = np.random.default_rng(n_seeds)
    frames = []
    for seed in range(n_seeds):
        nmi = level + generator.uniform(-0.1, 0.1, n_epochs)
        nmi[0] = np.nan
        loss = np.linspace(2.9, 1.5, n_epochs) + generator.uniform(-0.2, 0.2, n_epochs)
        frames.append(
            pd.DataFrame(
                {
                    "epoch": np.arange(1, n_epochs + 1),
                    "seed": seed,
                    "nmi_prev": nmi,
                    "ami_prev": nmi - 0.1,
                    "loss": loss,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


RUNS = {"alexnet": metrics(), "p4m": metrics(level=0.5)}
CHANCE = {"alexnet": 0.04, "p4m": 0.05}


def maps(n=300, n_clusters=12):
    generator = np.random.default_rng(0)
    names = [
        style.NO_FINDING,
        "Effusion",
        "Mass",
        "Effusion|Mass",
        "Nodule",
        "Hernia",
        "Edema",
        "Fibrosis",
        "Pneumonia",
        "Infiltration",
    ]
    findings = list(generator.choice(names, n))
    points = {arm: generator.normal(0, 10, (n, 2)) for arm in ("alexnet", "p4m")}
    clusters = {arm: generator.integers(n_clusters, size=n) for arm in points}
    return points, clusters, findings


def probes():
    rows = [
        {
            "target": "clusters",
            "arm": "alexnet",
            "accuracy": 0.93,
            "ci_low": 0.90,
            "ci_high": 0.95,
            "baseline": 0.10,
        },
        {
            "target": "clusters",
            "arm": "p4m",
            "accuracy": 0.83,
            "ci_low": 0.80,
            "ci_high": 0.86,
            "baseline": 0.11,
        },
        {
            "target": "label_combinations",
            "arm": "alexnet",
            "accuracy": 0.55,
            "ci_low": 0.52,
            "ci_high": 0.58,
            "baseline": 0.56,
        },
        {
            "target": "label_combinations",
            "arm": "p4m",
            "accuracy": 0.56,
            "ci_low": 0.53,
            "ci_high": 0.59,
            "baseline": 0.56,
        },
    ]
    return pd.DataFrame(rows).assign(
        published=[0.564, 0.567] * 2,
        published_baseline=[np.nan, np.nan, 0.59, 0.59],
        n_seeds=[3, 3, 1, 1],
    )


def xrays(n=40):
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (n, 64, 64), dtype=np.uint8)
    return images, [["Mass", "Mass|Nodule", style.NO_FINDING, "Effusion"][i % 4] for i in range(n)]


FIGURES = {
    "pipeline": lambda: training.pipeline(xrays()[0][0], LABEL),
    "samples": lambda: training.samples(*xrays(), LABEL),
    "nmi": lambda: training.nmi_curves(RUNS, PUBLISHED, CHANCE, LABEL, published_chance=0.22),
    "nmi_narrow": lambda: training.nmi_curves(
        RUNS, PUBLISHED, CHANCE, LABEL, published_chance=0.22, columns=1
    ),
    "nmi_four_arms": lambda: training.nmi_curves(
        {**RUNS, "p4m_augmented": metrics(2), "cnn": metrics(1)}, PUBLISHED, CHANCE, LABEL
    ),
    "loss": lambda: training.loss_curves(RUNS, PUBLISHED, 20, LABEL),
    "loss_narrow": lambda: training.loss_curves(RUNS, PUBLISHED, 20, LABEL, columns=1),
    "tsne": lambda: training.tsne_maps(*maps(), LABEL),
    "tsne_narrow": lambda: training.tsne_maps(*maps(), LABEL, columns=1),
    "clusters": lambda: training.clusters(
        xrays()[0], np.random.default_rng(0).random((40, 3)), np.arange(40) % 7, LABEL
    ),
    "probes": lambda: training.probe_bars(probes(), LABEL),
    "probes_wide": lambda: training.probe_bars(probes(), LABEL, columns=2),
}


def texts(figure):
    """Every text that is to be seen, by what it says."""
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


def said(figure):
    return "\n".join(t.get_text() for t in texts(figure))


def entries(axes):
    return [t.get_text() for t in axes.get_legend().get_texts()]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_names_its_dataset_and_nothing_is_cut_off_or_overlaps(name, monkeypatch):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert LABEL in said(figure)
    assert figure.get_figwidth() in style.COLUMN_INCHES.values()
    shown = list(drawn_texts(figure, monkeypatch).items())
    assert len(shown) > 5
    for (a, box_a), (b, box_b) in itertools.combinations(shown, 2):
        assert not box_a.padded(-0.5).overlaps(box_b.padded(-0.5)), (
            f"overlap: {a.get_text()!r} and {b.get_text()!r}"
        )


def test_a_missing_name_of_the_dataset_is_an_error():
    with pytest.raises(ValueError, match="dataset_label must name the dataset"):
        training.nmi_curves(RUNS, None, CHANCE, "  ")
    with pytest.raises(ValueError, match="dataset_label must name the dataset"):
        training.samples(*xrays(), None)


def test_nmi_panels_seeds_published_and_chance():
    figure = training.nmi_curves(RUNS, PUBLISHED, CHANCE, LABEL, published_chance=0.22)
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == (
        "AlexNet, rotation augmentation",
        "P4M, no augmentation",
    )
    assert left.get_ylim() == right.get_ylim() == (0, 1)
    assert entries(left)[:3] == ["mean of 3 seeds", "3 seeds, min to max", "AMI (chance is 0)"]
    assert entries(left)[3:] == [
        "published (K = 200)",
        "chance, this run: 0.04",
        "chance, K = 200: 0.22",
    ]
    lines = {line.get_label(): line for line in right.lines}
    np.testing.assert_allclose(lines["published (K = 200)"].get_ydata()[[0, -1]], [0.73, 0.79])
    assert lines["published (K = 200)"].get_linestyle() == ":"
    assert set(lines["chance, this run: 0.05"].get_ydata()) == {0.05}
    mean = RUNS["p4m"].groupby("epoch")["nmi_prev"].mean().dropna()
    np.testing.assert_allclose(lines["mean of 3 seeds"].get_xydata(), np.c_[mean.index, mean])
    assert mean.index[0] == 2
    band = right.collections[0].get_datalim(right.transData)
    np.testing.assert_allclose(
        (band.y0, band.y1), (RUNS["p4m"]["nmi_prev"].min(), RUNS["p4m"]["nmi_prev"].max())
    )


def test_curves_with_one_seed_no_published_curve_and_one_arm():
    figure = training.nmi_curves({"p4m": metrics(1, 2)}, None, {"p4m": 0.05}, LABEL)
    assert entries(figure.axes[1]) == [
        "this run, 1 seed",
        "AMI (chance is 0)",
        "chance, this run: 0.05",
    ]
    assert not figure.axes[1].collections
    assert figure.axes[0].get_legend() is None
    assert figure.axes[0].texts[0].get_text() == "no run of this arm"
    first_epoch = training.nmi_curves({"p4m": metrics(1, 1)}, None, {}, LABEL)
    assert first_epoch.axes[1].texts[0].get_text() == "needs two epochs"
    loss = training.loss_curves({"alexnet": metrics(1, 1)}, None, 8, LABEL)
    assert entries(loss.axes[0]) == ["this run, 1 seed", "chance (uniform guess)"]


def test_mean_and_band_use_only_epochs_that_all_seeds_have():
    run = metrics(2, 6)
    unfinished = run[~((run["seed"] == 1) & (run["epoch"] > 4))]
    axes = training.loss_curves({"alexnet": unfinished}, None, 20, LABEL).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["mean of 2 seeds"].get_xdata()[-1] == 4
    assert max(line.get_xdata()[-1] for line in axes.lines if line.get_linewidth() == 0.5) == 6


def test_loss_is_in_units_of_ln_k_for_both_k():
    figure = training.loss_curves(RUNS, PUBLISHED, 20, LABEL)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    mean = RUNS["alexnet"].groupby("epoch")["loss"].mean()
    np.testing.assert_allclose(lines["mean of 3 seeds"].get_ydata(), mean / np.log(20))
    np.testing.assert_allclose(lines["published (K = 200)"].get_ydata()[0], 6.31 / np.log(200))
    assert set(lines["chance (uniform guess)"].get_ydata()) == {1}
    assert "ln 20 = 3.00; published ln 200 = 5.30" in said(figure)
    nats = figure.axes[1].child_axes[0]
    with style.context():
        figure.draw_without_rendering()
    np.testing.assert_allclose(nats.get_ylim(), np.array(figure.axes[1].get_ylim()) * np.log(20))
    with pytest.raises(ValueError, match="n_clusters must be at least 2"):
        training.loss_curves(RUNS, PUBLISHED, 1, LABEL)


def test_curves_refuse_tables_they_would_misread():
    with pytest.raises(ValueError, match=r"runs\['p4m'\] has no column nmi_prev, seed"):
        training.nmi_curves({"p4m": metrics().drop(columns=["seed", "nmi_prev"])}, None, {}, LABEL)
    with pytest.raises(ValueError, match="duplicate"):
        training.nmi_curves({"p4m": pd.concat([metrics(1), metrics(1)])}, None, {}, LABEL)
    with pytest.raises(ValueError, match="columns must be 1"):
        training.nmi_curves(RUNS, None, {}, LABEL, columns=3)


def test_tsne_colours_by_cluster_and_by_finding():
    points, clusters, findings = maps()
    figure = training.tsne_maps(points, clusters, findings, LABEL)
    panels, key = figure.axes[:4], figure.axes[4]
    assert [axes.get_ylabel() for axes in panels[::2]] == ["by cluster", "by finding"]
    assert panels[0].get_xlabel() == "12 clusters"
    for axes in panels:
        assert axes.get_aspect() == 1
        assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0
        assert sum(len(dots.get_offsets()) for dots in axes.collections) == len(findings)
    counts = pd.Series(findings).value_counts()
    assert f"No Finding ({counts['No Finding']})" in entries(key)
    assert f"several findings ({counts['Effusion|Mass']})" in entries(key)
    single = counts.drop(["No Finding", "Effusion|Mass"])
    assert f"another single finding ({single.sum() - single.nlargest(6).sum()})" in entries(key)
    assert len(entries(key)) == 9


def test_tsne_with_200_clusters_and_one_arm():
    points, _, findings = maps(600)
    clusters = {"p4m": np.arange(600) % 200}
    figure = training.tsne_maps({"p4m": np.concatenate([points["p4m"]])}, clusters, findings, LABEL)
    assert figure.axes[1].get_xlabel() == "200 clusters"
    assert "repeat after 49" in said(figure)
    looks = {
        (tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices))
        for c in figure.axes[1].collections
    }
    assert len(looks) > 20
    assert [axes.texts[0].get_text() for axes in figure.axes[:4:2]] == ["no run of this arm"] * 2
    with pytest.raises(ValueError, match="arm 'p4m': need points"):
        training.tsne_maps({"p4m": points["p4m"][:5]}, clusters, findings, LABEL)


def test_samples_prefer_single_findings_and_name_what_is_absent():
    images, findings = xrays()
    images[:] = np.arange(len(images), dtype=np.uint8)[
        :, None, None
    ]  # the pixels tell which image is shown
    figure = training.samples(images, findings, LABEL, examples_per_finding=12)
    by_name = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert len(by_name) == 15
    assert by_name["Hernia (0)"].texts[0].get_text() == "none in this dataset"
    mass = [int(image.get_array()[0, 0]) for image in by_name["Mass (20)"].images]
    assert len(mass) == len(set(mass)) == 12
    assert [findings[i] for i in mass] == ["Mass"] * 10 + ["Mass|Nodule"] * 2
    assert [t.get_text() for t in by_name["Mass (20)"].texts] == ["+", "+"]
    assert {
        findings[int(image.get_array()[0, 0])] for image in by_name["No Finding (10)"].images
    } == {style.NO_FINDING}
    again = training.samples(images, findings, LABEL, examples_per_finding=12)
    other = training.samples(images, findings, LABEL, examples_per_finding=12, seed=1)

    def shown(f):
        return [int(image.get_array()[0, 0]) for axes in f.axes for image in axes.images]

    assert shown(again) == shown(figure) != shown(other)
    with pytest.raises(ValueError, match="one entry of findings each"):
        training.samples(images, findings[:-1], LABEL)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        training.samples(images, findings, LABEL, examples_per_finding=0)


def test_clusters_show_the_largest_first_and_the_nearest_first():
    images = np.zeros((9, 64, 64), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None]
    embedding = np.array([0, 8, 1, 9, 5, 6, 7, 3, 4])[:, None] ** 2
    figure = training.clusters(
        images, embedding, np.array([4, 4, 4, 4, 4, 1, 1, 1, 2]), LABEL, n_rows=2, per_row=4
    )
    pixels = [[float(image.get_array()[0, 0]) for image in axes.images] for axes in figure.axes]
    assert pixels == [[2], [4], [1], [2], [0], [6], [5], [6], [7], []]
    assert "2 largest of 3 clusters" in said(figure)
    with pytest.raises(ValueError, match="9 images, 8 rows of the embedding"):
        training.clusters(images, embedding[:8], np.zeros(9, int), LABEL)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        training.clusters(images, embedding, np.zeros(9, int), LABEL, n_rows=0)


def test_samples_show_a_finding_outside_the_fourteen():
    figure = training.samples(np.zeros((1, 64, 64), np.uint8), ["Scoliosis"], LABEL)
    assert "Scoliosis (1)" in said(figure)


def test_probe_dots_intervals_and_baselines():
    axes = training.probe_bars(probes(), LABEL).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        *("clusters (accuracy)", "AlexNet (3 seeds)", "P4M (3 seeds)"),
        *("label combinations (accuracy)", "AlexNet (1 seed)", "P4M (1 seed)"),
    ]
    drawn = np.concatenate([line.get_xdata() for line in axes.lines])
    for column in ("accuracy", "ci_low", "ci_high", "baseline", "published", "published_baseline"):
        assert set(probes()[column].dropna()) <= set(drawn), column
    assert entries(axes) == [
        "this run, 95 % interval",
        "majority baseline, this run",
        "published",
        "majority baseline, published",
    ]
    auroc = probes()[:1].assign(target="findings", arm="p4m-untrained", n_seeds=np.nan)
    assert [t.get_text() for t in training.probe_bars(auroc, LABEL).axes[0].get_yticklabels()] == [
        "findings (mean AUROC)",
        "P4M untrained",
    ]
    plain = training.probe_bars(
        probes().drop(columns=["published", "published_baseline", "n_seeds"]), LABEL
    ).axes[0]
    assert entries(plain) == ["this run, 95 % interval", "majority baseline, this run"]
    with pytest.raises(ValueError, match="lacks column baseline"):
        training.probe_bars(probes().drop(columns="baseline"), LABEL)
    with pytest.raises(ValueError, match="outside its interval"):
        training.probe_bars(probes().assign(accuracy=0.99), LABEL)


def test_pipeline_names_every_step_and_draws_eight_different_poses():
    figure = training.pipeline(xrays()[0][0])
    for step in (
        "AlexNet",
        "Sobel",
        "random rotations",
        "P4M",
        "8 poses",
        "features",
        "PCA",
        "whitening",
        "L2",
        "K-means",
        "cross-entropy",
    ):
        assert step in said(figure)
    poses = {
        np.asarray(i.get_array()).tobytes()
        for i in figure.axes[0].images
        if i.get_array().shape == (5, 5)
    }
    assert len(poses) == 8
    with pytest.raises(ValueError, match="one square gray image"):
        training.pipeline(np.zeros((3, 64, 64), np.uint8))


@pytest.mark.parametrize("name", ["pipeline", "nmi", "tsne", "probes"])
def test_save_gives_the_same_bytes_for_the_same_figure(name, tmp_path):
    def digests(figure, folder):
        return [
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in style.save(figure, tmp_path / folder / "fig")
        ]

    figure = FIGURES[name]()
    first = digests(figure, "a")
    assert digests(figure, "b") == first
    with matplotlib.rc_context(
        {"font.size": 20, "svg.hashsalt": None, "axes.facecolor": "pink"}
    ):  # a user's own taste changes nothing
        assert digests(FIGURES[name](), "c") == first


def test_save_writes_300_dpi_and_self_contained_svg(tmp_path):
    png, svg = style.save(FIGURES["nmi"](), tmp_path / "new" / "fig1.v2_nmi")
    assert (png.name, svg.name) == ("fig1.v2_nmi.png", "fig1.v2_nmi.svg")
    with Image.open(png) as image:
        assert image.width == 2100
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert "Software" not in image.info
    text = svg.read_text(encoding="utf-8")
    assert "http://www.w3.org/2000/svg" in text
    for absent in ("<text", "font-family", "<dc:date>"):  # glyphs are outlines
        assert absent not in text
    assert sorted(p.name for p in png.parent.iterdir()) == [png.name, svg.name]


def test_save_keeps_the_old_file_when_drawing_fails(tmp_path, monkeypatch):
    (tmp_path / "fig.png").write_bytes(b"old")

    def half(self, handle, **kwargs):
        handle.write(b"half of a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match=r"fig\.png: No space left"):
        style.save(FIGURES["probes"](), tmp_path / "fig")
    assert (tmp_path / "fig.png").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["fig.png"]


def test_no_global_state():
    before = dict(matplotlib.rcParams)
    FIGURES["loss"]()
    assert dict(matplotlib.rcParams) == before
    code = "import sys, lib.plots; assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)


def test_palette_differs_in_gray_or_by_marker():
    assert (
        len(style.PALETTE)
        == len(style.MARKERS)
        == len(set(style.MARKERS))
        == len(set(style.PALETTE))
    )


def test_published_curves_are_the_facts():
    assert list(PUBLISHED.columns) == ["arm", "epoch", "nmi_prev", "loss"]
    for arm, nmi_sum, loss_sum in (("alexnet", 10.25, 109.86), ("p4m", 14.67, 112.39)):
        rows = PUBLISHED[PUBLISHED["arm"] == arm]
        assert rows["epoch"].tolist() == list(range(1, 21))
        assert rows["nmi_prev"].isna().tolist() == [True] + [False] * 19
        assert rows["loss"].notna().all()
        assert rows["nmi_prev"].sum() == pytest.approx(nmi_sum, abs=1e-6)
        assert rows["loss"].sum() == pytest.approx(loss_sum, abs=1e-6)
        assert rows["nmi_prev"].dropna().between(0.38, 0.80).all()
        assert rows["loss"].between(4.71, 8.19).all()
    values = PUBLISHED.to_csv(index=False, float_format="%.2f", lineterminator="\n")
    assert (
        hashlib.sha256(values.encode()).hexdigest()
        == "e3df228c22aebcf53611fdd48fda09babd2e394a16f048e398ae669fee457d33"
    )


def test_published_numbers_are_the_facts():
    numbers = json.loads((PUBLISHED_DIR / "numbers.json").read_text(encoding="utf-8"))
    probe, final = numbers["linear_probe"], numbers["final_assignments"]
    assert (probe["alexnet"], probe["p4m"], probe["majority_baseline_recomputed"]) == (
        0.5640,
        0.5673,
        0.590,
    )
    assert max(probe["alexnet"], probe["p4m"]) < probe["majority_baseline_recomputed"]
    assert (final["alexnet"]["n_images"], final["alexnet"]["largest_cluster"]) == (24390, 242)
    assert (
        final["p4m"]["n_images"],
        final["p4m"]["clusters_used"],
        final["p4m"]["largest_cluster"],
    ) == (16258, 69, 12226)
    assert numbers["protocol"]["ln_n_clusters"] == pytest.approx(
        np.log(numbers["protocol"]["n_clusters"]), abs=5e-5
    )
    for text in (numbers["caveat"], (PUBLISHED_DIR / "README.md").read_text(encoding="utf-8")):
        assert "cannot be known" in text
    chance, generator = numbers["chance"], np.random.default_rng(0)
    random = generator.integers(chance["n_clusters"], size=(2, chance["n_images"]))
    assert normalized_mutual_info_score(*random) == pytest.approx(
        chance["nmi_of_two_random_assignments"], abs=0.002
    )


def test_thin_lines_keep_their_colours_in_notebooks(monkeypatch):
    kept = {}
    formatters = {"image/png": SimpleNamespace(for_type=lambda kind, png: kept.update({kind: png}))}
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters=formatters))
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    style.show_in_notebooks()
    pixels = (
        np.asarray(Image.open(io.BytesIO(kept[Figure](FIGURES["nmi"]()))).convert("RGB"))
        .reshape(-1, 3)
        .astype(int)
    )
    for color in style.PALETTE[:2]:
        assert np.abs(pixels - 255 * np.array(to_rgb(color))).max(axis=1).min() <= 24, color


def test_the_last_bit_of_a_place_does_not_change_the_file(tmp_path):
    for name, left in (("a", 0.1), ("b", float(np.nextafter(0.1, 1)))):
        figure = Figure()
        for place in ([left, 0.1, 0.3, 0.8], [0.6, 0.1, 0.3, 0.8]):
            figure.add_axes(place).plot([0, 1])
        style.save(figure, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    clips = re.findall(rb'<clipPath id="(\w+)"', drawn)
    assert len(set(clips)) == len(clips) == 2
    assert set(clips) == set(re.findall(rb"url\(#(\w+)\)", drawn))
