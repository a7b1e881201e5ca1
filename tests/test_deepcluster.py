"""The loop: one image is one row everywhere, a killed run ends like an unbroken one, the loop finds
classes that are there, and bad input is named.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas as pd
import pytest
import torch

import lib.deepcluster
import lib.models
from lib.deepcluster import TrainConfig, fit, labels_to_train_on, uniform_over_clusters
from lib.metrics import nmi
from lib.paths import ROOT, load_json, save_json
from lib.runs import RunMismatchError, load_model, load_run

SECONDS = ["seconds_features", "seconds_cluster", "seconds_train"]
SIZES = {"n_clusters": 4, "pca_dim": 8, "epochs": 2, "batch_size": 16, "rotation_degrees": 180}
SMALL = TrainConfig("alexnet", width=(4, 8, 8, 8, 8, 16), device="cpu", **SIZES)


def pictures(n=40, seed=0):
    """Four kinds of bright blobs with noise: image i is of kind i mod 4."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, 64, 64), dtype=np.uint8)
    for i in range(n):
        y, x = divmod(i % 4, 2)
        images[i, 32 * y : 32 * y + 28, 32 * x : 32 * x + 28] += 150
    return images


IMAGES = pictures()


def run(path, config=SMALL, images=IMAGES, **options):
    return fit(images, config, path, progress=False, **options)


def changed(**settings):
    return dataclasses.replace(SMALL, **settings)


def bytes_of(run_dir):
    """What a run computed, times left out."""
    table = pd.read_csv(run_dir / "metrics.csv", dtype=str).drop(columns=SECONDS).to_csv()
    files = ("assignments.npy", "features.npy")
    return (table, *((run_dir / name).read_bytes() for name in files))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken") / "run")


def test_run_folder(unbroken):
    names = {"config.json", "metrics.csv", "assignments.npy", "features.npy", "checkpoint.pt"}
    assert {p.name for p in unbroken.path.iterdir()} == names | {"clustering.npz"}
    assert list(unbroken.metrics.epoch) == [1, 2]
    assert list(unbroken.metrics.nmi_prev.between(0, 1)) == [False, True]  # NaN, then a number
    assert unbroken.assignments.shape == (2, 40)
    assert unbroken.features.shape == (40, 16)
    assert unbroken.config == SMALL


class Planted(lib.models.Backbone):
    """Reads the index written in the first pixels of an image, and keeps what it has seen."""

    WIDTH = (1,)
    seen: list = []  # noqa: RUF012 (filled by the test that looks at it)

    def __init__(self, n_clusters, width, head):
        super().__init__(2, n_clusters, head)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def features(self, x):
        pixels = ((x[:, 0, 0, :2] + 1) * 127.5).round().long()
        index = pixels[:, 0] * 256 + pixels[:, 1]
        if self.training:
            Planted.seen.append(index)
        angle = index * 2.399963  # golden angle: neighbours in index lie apart on the circle
        return torch.stack([angle.cos(), angle.sin()], 1) * self.weight


def test_image_feature_cluster_and_label_are_the_same_image(tmp_path, monkeypatch):
    n, k = 300, 7
    images = np.zeros((n, 64, 64), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(n), 256)
    monkeypatch.setitem(lib.models.BACKBONES, "planted", Planted)
    monkeypatch.setitem(lib.runs.CHOICES, "backbone", ("planted",))
    monkeypatch.setattr(Planted, "seen", [])
    labels_seen, cross_entropy = [], torch.nn.functional.cross_entropy

    def watched(logits, y, **options):
        labels_seen.append(y)
        return cross_entropy(logits, y, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    config = TrainConfig("planted", k, pca_dim=2, epochs=2, batch_size=32, device="cpu")
    found = run(tmp_path, config, images)
    seen = torch.cat(Planted.seen).numpy(), torch.cat(labels_seen).numpy()
    for epoch, (index, labels) in enumerate(np.stack(seen).reshape(2, 2, n).swapaxes(0, 1)):
        np.testing.assert_array_equal(labels, found.assignments[epoch][index])
        assert not np.array_equal(index, np.sort(index))
    angle = np.arange(n) * 2.399963
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    np.testing.assert_allclose(found.features / found.features[0, 0], circle, atol=1e-3)
    # the clusters of a circle are arcs: neighbours share their cluster but at K borders
    around = found.final_assignments[np.argsort(angle % (2 * np.pi))]
    assert (around != np.roll(around, 1)).sum() == k


def test_same_seed_same_bytes_other_seed_other_bytes(unbroken, tmp_path):
    state = torch.get_rng_state()
    assert bytes_of(run(tmp_path / "a").path) == bytes_of(unbroken.path)
    assert bytes_of(run(tmp_path / "b", changed(seed=1)).path) != bytes_of(unbroken.path)
    assert torch.equal(torch.get_rng_state(), state)  # the global one is left


@pytest.mark.parametrize("statistics", ["fresh", "running"])
def test_continuing_equals_an_unbroken_run(tmp_path, statistics):
    config = changed(bn_statistics=statistics)
    whole = run(tmp_path / "whole", config)
    run(tmp_path / "parts", dataclasses.replace(config, epochs=1))
    longer = run(tmp_path / "parts", config)
    assert bytes_of(longer.path) == bytes_of(whole.path)
    with pytest.raises(RunMismatchError, match="2 epochs, 1 asked"):
        run(tmp_path / "parts", dataclasses.replace(config, epochs=1))
    assert len(load_run(longer.path).metrics) == 2  # the refusal changed nothing


def test_finished_run_is_not_trained_again(unbroken):
    stamp = (unbroken.path / "checkpoint.pt").stat().st_mtime_ns
    run(unbroken.path)
    assert (unbroken.path / "checkpoint.pt").stat().st_mtime_ns == stamp


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("rename", [3, 8])
def test_killed_at_a_rename_ends_like_an_unbroken_run(unbroken, tmp_path, rename):
    """What is on the disk changes there alone. The number of threads decides the bits."""
    with pytest.raises(FileNotFoundError, match="no run"):
        load_run(tmp_path)
    script = f"""
import os, signal, torch
from tests.test_deepcluster import run
torch.set_num_threads({torch.get_num_threads()})
real, count = os.replace, 0
def replace(*names):
    global count
    count += 1
    if count == {rename}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
run({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="not finished"):
        load_run(tmp_path)
    assert bytes_of(run(tmp_path).path) == bytes_of(unbroken.path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_settings_or_images_are_refused_and_can_be_set_aside(tmp_path):
    folder = tmp_path / "run"
    before = bytes_of(run(folder).path)
    with pytest.raises(RunMismatchError, match=r"lr 0\.001, now 0\.01.*--restart"):
        run(folder, changed(lr=0.01))
    with pytest.raises(RunMismatchError, match="other images"):
        run(folder, images=pictures(seed=1))
    with pytest.raises(RunMismatchError, match="backbone alexnet, now p4m"):
        run(folder, TrainConfig("p4m", 4, 8, 2, width=(2, 2, 4)))
    assert bytes_of(folder) == before
    restarted = run(folder, changed(lr=0.01), restart=True)
    assert bytes_of(tmp_path / "run.old1") == before != bytes_of(restarted.path)


def test_a_checkpoint_that_is_damaged_or_holds_code_is_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    path = run(tmp_path, changed(epochs=1)).path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        run(tmp_path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_untrained_network(unbroken, tmp_path):
    untrained = run(tmp_path / "fresh", changed(epochs=0))
    np.testing.assert_array_equal(untrained.final_assignments, unbroken.assignments[0])
    found = run(tmp_path / "running", changed(epochs=0, bn_statistics="running"))
    assert found.assignments.shape == (0, 40)
    assert len(found.metrics) == 0
    fresh = lib.models.build("alexnet", 4, SMALL.width, seed=0).state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in load_model(found).state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "width", "n"),
    [("alexnet", (16, 32, 32, 32, 32, 64), 480), ("p4m", (2, 4, 8), 240)],
)
def test_the_loop_finds_classes_that_are_there(tmp_path, backbone, width, n):
    """The positive control in small: rings and discs of two sizes, anywhere in the image. AlexNet
    learns them; P4M sees them untrained, and keeps them.
    """
    rng, kinds = np.random.default_rng(0), np.arange(n) % 4
    rows, columns = np.mgrid[:64, :64]
    centre = rng.uniform(24, 40, (n, 2))
    away = np.hypot(rows - centre[:, :1, None], columns - centre[:, 1:, None])
    inner, outer = np.array([[0, 0, 5, 12], [8, 16, 8, 16]])[:, kinds, None, None]
    noise = rng.integers(0, 60, (n, 64, 64))
    images = (160 * ((away < outer) & (away >= inner)) + noise).astype(np.uint8)
    config = TrainConfig(backbone, 8, 8, epochs=3, batch_size=16, width=width, device="cpu")
    found = run(tmp_path, config, images)
    before, after = (nmi(a, kinds) for a in (found.assignments[0], found.final_assignments))
    assert after > {"alexnet": before + 0.25, "p4m": 0.7}[backbone]


def test_uniform_over_clusters():
    labels = np.array([0] * 900 + [1] * 90 + [5] * 10)
    index = uniform_over_clusters(labels, np.random.default_rng(0))
    assert len(index) == 1000
    drawn = np.bincount(labels[index], minlength=6)
    assert drawn[[2, 3, 4]].sum() == 0
    assert np.ptp(drawn[[0, 1, 5]]) <= 2
    assert len(np.unique(index[labels[index] == 0])) == drawn[0]  # large ones without repetition


def test_labels_that_know_nothing_of_the_images(tmp_path):
    clusters = np.random.default_rng(0).integers(0, 4, 40)
    none = np.empty((0, 40), dtype=int)
    assert labels_to_train_on(clusters, none, SMALL) is clusters
    index = labels_to_train_on(clusters, none, changed(pseudo_labels="index"))
    np.testing.assert_array_equal(index, np.arange(40) % 4)
    shuffled = changed(pseudo_labels="shuffled")
    first = labels_to_train_on(clusters, none, shuffled)
    np.testing.assert_array_equal(np.bincount(first), np.bincount(clusters))
    assert not np.array_equal(first, clusters)
    # later epochs, resumed or not, keep the shuffle of the first epoch's clusters
    later = labels_to_train_on(clusters[::-1], clusters[None], shuffled)
    np.testing.assert_array_equal(later, first)
    found = run(tmp_path, changed(pseudo_labels="index"))  # what is recorded are the clusters
    assert not np.array_equal(found.assignments[0], np.arange(40) % 4)


def another_fifth_step(monkeypatch, loss):
    """The second step of the second epoch gives this loss, or raises it."""
    steps = [DEFAULT] * 4 + [loss] + [DEFAULT] * 9
    patched = Mock(wraps=torch.nn.functional.cross_entropy, side_effect=steps)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", patched)


def test_loss_that_is_not_finite_stops_and_says_where(tmp_path, monkeypatch):
    another_fifth_step(monkeypatch, torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match="epoch 2, batch 2"):
        run(tmp_path)
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 1


def test_an_interrupted_run_goes_on_in_the_same_process(unbroken, tmp_path, monkeypatch):
    another_fifth_step(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 1
    assert bytes_of(run(tmp_path).path) == bytes_of(unbroken.path)


@pytest.mark.filterwarnings("ignore:PCA keeps")
def test_collapse_is_said(tmp_path):
    images = np.full((40, 64, 64), 90, np.uint8)
    images[:6] = IMAGES[:6]
    with pytest.warns(RuntimeWarning, match="collapsing"):
        run(tmp_path, changed(epochs=1), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        *((IMAGES[:1], "4 is more than the 1 images"), (IMAGES / 255, "float64")),
        *((IMAGES[:, :32], r"\(40, 32, 64\)"), ([1, 2], "list")),
    ],
)
def test_bad_images(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        fit(images, SMALL, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("backbone", "vgg"), ("n_clusters", 1), ("epochs", -1), ("lr", 0.0), ("lr", np.nan)),
        *(("rotation_degrees", -1.0), ("device", "tpu"), ("clusterer", "spectral")),
        *(("head", "round"), ("bn_statistics", "none"), ("pseudo_labels", "random")),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} .*{value}"):
        changed(**{name: value})


def test_another_version_of_the_code_is_said(tmp_path):
    run(tmp_path)
    config = tmp_path / "config.json"
    save_json(config, load_json(config) | {"code": "of last week"})
    for _ in range(2):  # the note of what began the run stays
        with pytest.warns(RuntimeWarning, match="another version of this code"):
            run(tmp_path)
