"""The loop: one image is one row everywhere, a killed run ends like an unbroken one, and bad input
is named.
"""

import dataclasses
import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import lib.deepcluster
import lib.models
from lib.deepcluster import (
    CollapseError,
    RunMismatchError,
    TrainConfig,
    fit,
    load_run,
    train_epoch,
    uniform_over_clusters,
)
from lib.kmeans import KMeans
from lib.paths import load_json, save_json
from lib.runs import CORE, assign, load_checkpoint, load_model

SECONDS = ["seconds_features", "seconds_cluster", "seconds_train"]
SMALL = TrainConfig(
    "alexnet",
    n_clusters=4,
    pca_dim=8,
    epochs=2,
    batch_size=16,
    width=(4, 8, 8, 8, 8, 16),
    rotation_degrees=180,
    device="cpu",
)


def pictures(n=40, seed=0):
    """Four kinds of bright blobs with noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, 64, 64), dtype=np.uint8)
    for i in range(n):
        y, x = divmod(i % 4, 2)
        images[i, 32 * y : 32 * y + 28, 32 * x : 32 * x + 28] += 150
    return images


def bytes_of(run_dir):
    """What a run computed, times left out."""
    table = pd.read_csv(run_dir / "metrics.csv", dtype=str).drop(columns=SECONDS).to_csv()
    return (
        table,
        (run_dir / "assignments.npy").read_bytes(),
        (run_dir / "features.npy").read_bytes(),
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return fit(pictures(), SMALL, path, progress=False)


def test_run_folder(unbroken):
    assert {p.name for p in unbroken.path.iterdir()} == {
        "config.json",
        "metrics.csv",
        "assignments.npy",
        "features.npy",
        "checkpoint.pt",
        "checkpoint.1.pt",
        "clustering.npz",
    }
    assert list(unbroken.metrics.columns) == lib.deepcluster.COLUMNS
    assert list(unbroken.metrics.epoch) == [1, 2]
    assert np.isnan(unbroken.metrics.nmi_prev[0])
    assert 0 <= unbroken.metrics.nmi_prev[1] <= 1
    assert unbroken.assignments.shape == (2, 40)
    assert unbroken.features.shape == (40, 16)
    assert np.isfinite(unbroken.features).all()
    assert unbroken.config == dataclasses.replace(SMALL, device="cpu")


class Planted(lib.models.Backbone):
    """Reads the index that is written in the first pixels of an image, and keeps what it has seen."""

    WIDTH = (1,)
    seen: list = []  # noqa: RUF012 (filled by the test that looks at it)

    def __init__(self, n_clusters, width):
        super().__init__(2, n_clusters)
        self.weight = torch.nn.Parameter(torch.ones(()))

    @staticmethod
    def index(x):
        pixels = ((x[:, 0, 0, :2] + 1) * 127.5).round().long()
        return pixels[:, 0] * 256 + pixels[:, 1]

    def features(self, x):
        index = self.index(x)
        if self.training:
            Planted.seen.append(index)
        angle = (
            index * 2.399963
        )  # golden angle: neighbours in index are no neighbours in feature space
        return torch.stack([angle.cos(), angle.sin()], 1) * self.weight


@pytest.mark.parametrize("uniform_sampling", [True, False])
def test_image_feature_cluster_and_label_are_the_same_image(
    tmp_path, monkeypatch, uniform_sampling
):
    n, k = 300, 7
    images = np.zeros((n, 64, 64), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(n), 256)
    monkeypatch.setitem(lib.models.BACKBONES, "planted", Planted)
    monkeypatch.setattr(Planted, "seen", [])
    labels_seen = []
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda logits, y: labels_seen.append(y) or cross_entropy(logits, y),
    )
    config = TrainConfig(
        "planted",
        k,
        pca_dim=2,
        epochs=2,
        batch_size=32,
        uniform_sampling=uniform_sampling,
        device="cpu",
    )
    run = fit(images, config, tmp_path, progress=False)

    steps = len(labels_seen) // 2
    assert steps == 10
    for epoch in range(2):
        index = torch.cat(Planted.seen[epoch * steps : (epoch + 1) * steps]).numpy()
        labels = torch.cat(labels_seen[epoch * steps : (epoch + 1) * steps]).numpy()
        np.testing.assert_array_equal(labels, run.assignments[epoch][index])
        assert len(np.unique(index)) == n if not uniform_sampling else len(index) == n
        assert not np.array_equal(index, np.sort(index))
    angle = np.arange(n) * 2.399963
    direction = run.features / np.linalg.norm(run.features, axis=1, keepdims=True)
    np.testing.assert_allclose(
        direction,
        np.sign(run.features[0, 0]) * np.stack([np.cos(angle), np.sin(angle)], 1),
        atol=1e-3,
    )
    # the clusters of a circle are arcs: neighbours on it share their cluster but at K borders
    round_the_circle = run.final_assignments[np.argsort(angle % (2 * np.pi))]
    assert (round_the_circle != np.roll(round_the_circle, 1)).sum() == k


def test_same_seed_same_bytes_other_seed_other_bytes(unbroken, tmp_path):
    again = fit(pictures(), SMALL, tmp_path / "a", progress=False)
    assert bytes_of(again.path) == bytes_of(unbroken.path)
    other = fit(pictures(), dataclasses.replace(SMALL, seed=1), tmp_path / "b", progress=False)
    assert bytes_of(other.path) != bytes_of(unbroken.path)


def test_global_random_state_is_left(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the legacy state is what must not move)
    expected = torch.rand(2), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    fit(pictures(), SMALL, tmp_path, progress=False)
    assert torch.equal(torch.rand(2), expected[0])
    assert np.random.rand() == expected[1]  # noqa: NPY002


def test_continuing_equals_an_unbroken_run(unbroken, tmp_path):
    shorter = fit(pictures(), dataclasses.replace(SMALL, epochs=1), tmp_path, progress=False)
    assert len(shorter.metrics) == 1
    longer = fit(pictures(), SMALL, tmp_path, progress=False)
    assert bytes_of(longer.path) == bytes_of(unbroken.path)
    with pytest.raises(RunMismatchError, match="has 2 epochs, 1 asked"):
        fit(pictures(), dataclasses.replace(SMALL, epochs=1), tmp_path, progress=False)
    assert len(load_run(tmp_path).metrics) == 2  # the refusal changed nothing


def test_finished_run_is_not_trained_again(unbroken):
    stamp = (unbroken.path / "checkpoint.pt").stat().st_mtime_ns
    fit(pictures(), SMALL, unbroken.path, progress=False)
    assert (unbroken.path / "checkpoint.pt").stat().st_mtime_ns == stamp


KILLED = """
    import os, signal, sys
    import torch
    torch.set_num_threads({threads})
    from lib.deepcluster import fit
    from tests.test_deepcluster import SMALL, pictures
    real, count = os.replace, 0
    def replace(*args):
        global count
        count += 1
        if count == {at} and not {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if count == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
    fit(pictures(), SMALL, {path!r}, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("at", "after"), [(2, False), (3, True), (8, False), (12, False)])
def test_killed_run_ends_like_an_unbroken_one(unbroken, tmp_path, at, after):
    """The process is killed with -9 before or after one of its renames: in the first epoch, between
    two files, in the last lines.
    """
    script = textwrap.dedent(
        KILLED.format(at=at, after=after, path=str(tmp_path), threads=torch.get_num_threads())
    )
    root = Path(lib.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(FileNotFoundError):
        load_run(tmp_path)
    assert bytes_of(fit(pictures(), SMALL, tmp_path, progress=False).path) == bytes_of(
        unbroken.path
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no fork")
def test_killed_at_twenty_moments(tmp_path):
    """kill -9 at moments spread over the whole length of a run: each that goes on ends like the
    unbroken one.
    """
    root = Path(lib.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers", "kill", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    epochs = json.loads((tmp_path / "killed.json").read_text())
    assert len(epochs) == 20
    assert len(set(epochs)) > 2, epochs  # in different epochs, and before the first was done
    unbroken = bytes_of(tmp_path / "unbroken" / "run")
    for k in range(20):
        run_dir = tmp_path / f"killed{k}" / "run"
        assert bytes_of(run_dir) == unbroken, f"killed after {epochs[k]} epochs"
        assert not [p.name for p in run_dir.iterdir() if p.name.startswith(".")]


def test_full_disk_leaves_nothing_half_written(unbroken, tmp_path, monkeypatch):
    save = np.save

    def full(handle, array, **kwargs):
        if array.dtype == np.float32:  # the features
            handle.write(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(handle, array, **kwargs)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"features\.npy: No space left on device"):
        fit(pictures(), SMALL, tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "metrics.csv",
        "assignments.npy",
        "checkpoint.pt",
        "checkpoint.1.pt",
    }
    monkeypatch.undo()
    assert bytes_of(fit(pictures(), SMALL, tmp_path, progress=False).path) == bytes_of(
        unbroken.path
    )


@pytest.mark.parametrize("room", [0, 1, 2])
def test_full_disk_at_a_checkpoint(unbroken, tmp_path, monkeypatch, room):
    """The disk is full at the checkpoint of epoch `room` + 1: the ones before are whole, and the
    run goes on from them.
    """
    save, saved = torch.save, []

    def full(state, handle):
        if len(saved) == room:
            handle.write(b"half a ch")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(len(state["rows"]))
        save(state, handle)

    monkeypatch.setattr(torch, "save", full)
    config = dataclasses.replace(SMALL, epochs=3)
    with pytest.raises(OSError, match=r"checkpoint\.new\.pt: No space left on device"):
        fit(pictures(), config, tmp_path, progress=False)
    assert not list(tmp_path.glob(".*"))
    assert [
        len(load_checkpoint(p)["rows"])
        for p in lib.runs.checkpoint_paths(tmp_path / "checkpoint.pt")
    ] == saved[::-1]
    monkeypatch.undo()
    assert (
        fit(pictures(), config, tmp_path, progress=False).metrics.loss[:2].tolist()
        == unbroken.metrics.loss.tolist()
    )


def test_the_last_checkpoints_are_kept(tmp_path):
    fit(
        pictures(),
        dataclasses.replace(SMALL, epochs=4, keep_checkpoints=3),
        tmp_path,
        progress=False,
    )
    names = {p.name: len(load_checkpoint(p)["rows"]) for p in tmp_path.glob("*.pt")}
    assert names == {"checkpoint.pt": 4, "checkpoint.1.pt": 3, "checkpoint.2.pt": 2}
    fit(
        pictures(),
        dataclasses.replace(SMALL, epochs=5, keep_checkpoints=1),
        tmp_path,
        progress=False,
    )
    assert {p.name for p in tmp_path.glob("*.pt")} == {"checkpoint.pt"}


def test_other_settings_or_images_are_refused_and_can_be_set_aside(tmp_path):
    fit(pictures(), SMALL, tmp_path / "run", progress=False)
    before = bytes_of(tmp_path / "run")
    with pytest.raises(RunMismatchError, match=r"lr 0\.001, now 0\.01.*--restart"):
        fit(pictures(), dataclasses.replace(SMALL, lr=0.01), tmp_path / "run", progress=False)
    with pytest.raises(RunMismatchError, match="other images"):
        fit(pictures(seed=1), SMALL, tmp_path / "run", progress=False)
    with pytest.raises(RunMismatchError, match="backbone alexnet, now p4m"):
        fit(
            pictures(),
            TrainConfig("p4m", 4, 8, 2, width=(2, 2, 4)),
            tmp_path / "run",
            progress=False,
        )
    assert bytes_of(tmp_path / "run") == before
    fit(
        pictures(),
        dataclasses.replace(SMALL, lr=0.01),
        tmp_path / "run",
        restart=True,
        progress=False,
    )
    assert bytes_of(tmp_path / "run.old1") == before
    assert bytes_of(tmp_path / "run") != before


def test_damaged_checkpoint_is_named(tmp_path):
    fit(pictures(), dataclasses.replace(SMALL, epochs=1), tmp_path, progress=False)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read .* delete it"):
        fit(pictures(), SMALL, tmp_path, progress=False)


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(unbroken, tmp_path):
    """Also in a run that was finished: its network would be lost otherwise."""
    fit(pictures(), SMALL, tmp_path, progress=False)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.warns(
        RuntimeWarning,
        match=r"checkpoint\.pt cannot be read .*going on from checkpoint\.1\.pt, of epoch 1",
    ):
        again = fit(pictures(), SMALL, tmp_path, progress=False)
    assert bytes_of(again.path) == bytes_of(unbroken.path)
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["rows"]) == 2
    assert (
        len(load_checkpoint(tmp_path / "checkpoint.1.pt")["rows"]) == 1
    )  # the damaged one has not taken its place
    assert (tmp_path / "checkpoint.damaged.pt").exists()


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    """Also where config.json is gone, or is a later one."""
    fit(pictures(), dataclasses.replace(SMALL, epochs=1), tmp_path, progress=False)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        RunMismatchError, match=r"checkpoint\.pt holds another run \(lr 0\.001, now 0\.01\)"
    ):
        fit(pictures(), dataclasses.replace(SMALL, lr=0.01), tmp_path, progress=False)


def test_checkpoint_that_holds_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    (tmp_path / "run").mkdir()
    torch.save({"model": Evil()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        fit(pictures(), SMALL, tmp_path / "run", progress=False)
    assert not (tmp_path / "harm").exists()


def test_run_of_before_a_setting_was_there_goes_on(unbroken, tmp_path):
    fit(pictures(), dataclasses.replace(SMALL, epochs=1), tmp_path, progress=False)
    config = load_json(tmp_path / "config.json")
    del config["rotation_corners"], config["kmeans_engine"]
    save_json(tmp_path / "config.json", config)
    with pytest.raises(RunMismatchError, match="rotation_corners black, now reflect"):
        fit(
            pictures(),
            dataclasses.replace(SMALL, rotation_corners="reflect"),
            tmp_path,
            progress=False,
        )
    assert bytes_of(fit(pictures(), SMALL, tmp_path, progress=False).path) == bytes_of(
        unbroken.path
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rotation_corners": "reflect"},
        {"rotation_interpolation": "nearest"},
        {"kmeans_engine": "torch"},
    ],
    ids=str,
)
def test_settings_that_make_another_run(unbroken, tmp_path, change):
    config = dataclasses.replace(SMALL, **change)
    other = fit(pictures(), config, tmp_path, progress=False)
    assert other.config == config
    assert other.metrics.loss.tolist() != unbroken.metrics.loss.tolist()
    with pytest.raises(RunMismatchError, match=next(iter(change))):
        fit(pictures(), SMALL, tmp_path, progress=False)


def test_settings_of_how_to_compute_do_not(unbroken, tmp_path):
    """A run begun with channels last goes on without, to the same numbers but for rounding."""
    fit(
        pictures(),
        dataclasses.replace(SMALL, epochs=1, channels_last=True, amp="off", stop_on_collapse=True),
        tmp_path,
        progress=False,
    )
    run = fit(pictures(), SMALL, tmp_path, progress=False)
    assert run.metrics.loss[0] == pytest.approx(unbroken.metrics.loss[0], abs=1e-4)
    p4m = TrainConfig(
        "p4m", 4, 8, 1, 16, width=(2, 2, 4), channels_last=True, device="cpu"
    )  # whose filters have five axes
    assert np.isfinite(fit(pictures(), p4m, tmp_path / "p4m", progress=False).metrics.loss).all()


def test_compiled_network_has_the_same_checkpoint(unbroken, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda function: compiled.append(function) or (lambda x: function(x))
    )
    run = fit(pictures(), dataclasses.replace(SMALL, compile=True), tmp_path, progress=False)
    assert len(compiled) == 1
    assert bytes_of(run.path) == bytes_of(unbroken.path)
    assert set(load_model(run).state_dict()) == set(load_model(unbroken).state_dict())


class Small(torch.nn.Module):
    """A linear network on a GPU with room for `room` images."""

    def __init__(self, room):
        super().__init__()
        self.room, self.top_layer = room, torch.nn.Linear(64, 4)
        self.tried = []

    def features(self, x):
        self.tried.append(len(x))
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return x[:, 0].mean(1)

    def forward(self, x):
        return self.top_layer(self.features(x))


def step(room, n=40):
    torch.manual_seed(0)
    model = Small(room)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    loss = train_epoch(
        model,
        [optimizer],
        pictures(n),
        np.arange(n) % 4,
        dataclasses.replace(SMALL, batch_size=16),
        1,
    )
    return model, loss


def test_batch_that_does_not_fit_is_cut():
    """Gradients are added over the parts: the step of a network without batch norm is the same."""
    whole, loss = step(100)
    with pytest.warns(RuntimeWarning) as said:
        cut, loss_cut = step(5)
    assert [
        re.search(r"batch of 16 images: going on with (\d) parts", str(w.message))[1] for w in said
    ] == ["2", "4"]
    assert whole.tried == [16, 16, 8]
    assert cut.tried == [16, 8] + [4] * 8 + [2] * 4  # and stays cut
    assert loss_cut == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(cut.top_layer.weight, whole.top_layer.weight)


def test_no_part_is_one_image():
    """Batch norm cannot train on it."""
    with pytest.warns(RuntimeWarning):
        assert min(step(3, n=37)[0].tried) == 2
    with pytest.warns(RuntimeWarning), pytest.raises(torch.cuda.OutOfMemoryError):
        step(1)


def test_features_that_do_not_fit_are_cut():
    model = Small(5).eval()
    with pytest.warns(RuntimeWarning) as said:
        rows = lib.deepcluster.extract(model, pictures(), 16)
    assert [str(w.message).split(": ")[1] for w in said] == ["going on with 8", "going on with 4"]
    np.testing.assert_allclose(
        rows, lib.deepcluster.extract(Small(100).eval(), pictures(), 16), rtol=1e-6
    )
    assert model.tried == [16, 8] + [4] * 10
    with pytest.raises(torch.cuda.OutOfMemoryError), pytest.warns(RuntimeWarning):
        lib.deepcluster.extract(Small(0), pictures(), 16)


def test_untrained_network(tmp_path):
    run = fit(pictures(), dataclasses.replace(SMALL, epochs=0), tmp_path, progress=False)
    assert run.assignments.shape == (0, 40)
    assert len(run.metrics) == 0
    fresh = lib.models.build("alexnet", 4, SMALL.width, seed=0).state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in load_model(run).state_dict().items())


def test_model_and_clusters_can_be_used_again(unbroken):
    model = load_model(unbroken)
    features = lib.deepcluster.extract(model, pictures())
    np.testing.assert_allclose(features, unbroken.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(assign(unbroken, features), unbroken.final_assignments)


def test_blobs_are_found(tmp_path):
    """Four kinds of pictures, three directions between their means: the clusters follow the kinds,
    and the loss falls.
    """
    config = dataclasses.replace(SMALL, epochs=3, pca_dim=3, rotation_degrees=0)
    run = fit(pictures(80), config, tmp_path, progress=False)
    assert (
        lib.deepcluster.metrics.nmi(run.final_assignments, np.arange(80) % 4) > 0.5
    )  # two unrelated clusterings of this size: 0.05
    assert run.metrics.loss.iloc[-1] < run.metrics.loss.iloc[0]


def test_uniform_over_clusters():
    labels = np.array([0] * 900 + [1] * 90 + [5] * 10)
    index = uniform_over_clusters(labels, np.random.default_rng(0))
    assert len(index) == 1000
    drawn = np.bincount(labels[index], minlength=6)
    assert drawn[[2, 3, 4]].sum() == 0
    assert np.ptp(drawn[[0, 1, 5]]) <= 2
    assert (
        len(np.unique(index[labels[index] == 0])) == drawn[0]
    )  # a large cluster is drawn without repetition


def test_loss_that_is_not_finite_stops_and_says_where(tmp_path, monkeypatch):
    real, calls = torch.nn.functional.cross_entropy, []

    def cross_entropy(*args):
        calls.append(0)
        return real(*args) * (torch.nan if len(calls) == 5 else 1)  # 3 batches an epoch

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    with pytest.raises(FloatingPointError, match="epoch 2, batch 2 of 3"):
        fit(pictures(), SMALL, tmp_path, progress=False)
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 1


def test_collapse_is_said(tmp_path):
    images = np.full((40, 64, 64), 90, np.uint8)
    images[:6] = pictures(6)
    with pytest.warns(RuntimeWarning) as said:
        fit(images, dataclasses.replace(SMALL, epochs=1), tmp_path, progress=False)
    assert any(
        "the largest holds" in str(w.message) and "collapsing" in str(w.message) for w in said
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_collapse_can_end_the_run(tmp_path):
    images = np.full((40, 64, 64), 90, np.uint8)
    images[:6] = pictures(6)
    config = dataclasses.replace(SMALL, stop_on_collapse=True)
    for _ in range(2):  # and does not go on by itself
        with pytest.raises(
            CollapseError, match=r"epoch 1: .* collapsing; the epochs so far are kept"
        ):
            fit(images, config, tmp_path, progress=False)
        assert (
            len(pd.read_csv(tmp_path / "metrics.csv"))
            == len(load_checkpoint(tmp_path / "checkpoint.pt")["rows"])
            == 1
        )
    assert (
        len(
            fit(
                images,
                dataclasses.replace(config, stop_on_collapse=False),
                tmp_path,
                progress=False,
            ).metrics
        )
        == 2
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(3), "n_clusters = 4 is more than the 3 images"),
        (pictures(1), "n_clusters = 4 is more than the 1 images"),
        (pictures().astype(np.float32), "float32"),
        (pictures()[:, :32], r"\(40, 32, 64\)"),
        ([1, 2], "list"),
    ],
)
def test_bad_images(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        fit(images, SMALL, tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vgg"}, "'vgg' is unknown"),
        ({"n_clusters": 1}, "n_clusters must be at least 2, got 1"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"rotation_degrees": 360.0}, "at most 180"),
        ({"device": "tpu"}, "'tpu'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        (
            {"rotation_interpolation": "cubic"},
            "rotation_interpolation must be one of bilinear, nearest, got 'cubic'",
        ),
        (
            {"rotation_corners": "white"},
            "rotation_corners must be one of black, reflect, got 'white'",
        ),
        ({"amp": "fp16"}, "amp must be one of auto, off"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not write"):
        fit(pictures(), SMALL, tmp_path / "file" / "run", progress=False)


def test_another_version_of_the_code_is_said(tmp_path):
    fit(pictures(), SMALL, tmp_path, progress=False)
    config = load_json(tmp_path / "config.json")
    save_json(tmp_path / "config.json", config | {"code": "of last week"})
    for _ in range(2):  # and said again: the note of what began the run stays
        with pytest.warns(RuntimeWarning, match="another version of this code"):
            fit(pictures(), SMALL, tmp_path, progress=False)


def test_the_code_of_a_run_is_all_that_training_imports():
    script = "import sys, lib.deepcluster; print(*sorted(m[4:] for m in sys.modules if m.startswith('lib.')))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(lib.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(result.stdout.split()) == CORE


def test_training_code_cannot_see_labels():
    """The loop and all it imports know no metadata: lib.data is not among them."""
    script = "import sys, lib.deepcluster; sys.exit('lib.data' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], cwd=Path(lib.__file__).parent.parent
        ).returncode
        == 0
    )


def test_a_warm_start_begins_at_the_clusters_of_the_epoch_before(tmp_path, monkeypatch):
    begun = []

    @functools.wraps(KMeans.__init__)
    def watched(self, *args, init=None, _begin=KMeans.__init__, **kwargs):
        begun.append(init)
        _begin(self, *args, init=init, **kwargs)

    monkeypatch.setattr(KMeans, "__init__", watched)
    config = dataclasses.replace(SMALL, warm_start=True)
    run = fit(pictures(), config, tmp_path / "warm", progress=False)
    assert begun[0] is None
    assert len(begun) == 3
    for given, before in zip(begun[1:], run.assignments, strict=True):
        np.testing.assert_array_equal(given, before)
    fit(pictures(), dataclasses.replace(config, epochs=1), tmp_path / "resumed", progress=False)
    begun.clear()
    fit(pictures(), config, tmp_path / "resumed", progress=False)
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "warm")
    np.testing.assert_array_equal(begun[0], run.assignments[0])


@pytest.mark.parametrize("clusterer", ["minibatch", "hierarchical"])
def test_other_clusterers_can_take_the_place_of_kmeans(tmp_path, clusterer):
    run = fit(
        pictures(),
        dataclasses.replace(SMALL, clusterer=clusterer),
        tmp_path / "run",
        progress=False,
    )
    assert set(np.unique(run.final_assignments)) <= set(range(4))
    np.testing.assert_array_equal(assign(run, np.asarray(run.features)), run.final_assignments)
    with pytest.raises(RunMismatchError, match="clusterer"):
        fit(pictures(), SMALL, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clusterer": "spectral"},
            "clusterer must be one of kmeans, minibatch, hierarchical, graph, got 'spectral'",
        ),
        (
            {"clusterer": "minibatch", "warm_start": True},
            "warm_start is an option of K-means, not of clusterer 'minibatch'",
        ),
    ],
)
def test_clusterers_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SMALL, **changes)
