"""ChestMNIST's file, small: checked, and written as the three files that everything else reads."""

import os
import tracemalloc

import numpy as np
import pytest

from lib import data
from lib.data import chestmnist, nih


def medmnist(path, n=(7, 2, 3), **changed):
    """A file as MedMNIST writes it; arrays that are None are left out."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in zip(chestmnist.PARTS, n, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 64, 64), dtype=np.uint8)
        arrays[f"{part}_labels"] = (rng.random((count, 14)) < 0.2).astype(np.uint8)
    arrays["train_labels"][0] = 0
    arrays["train_labels"][1] = np.arange(14) % 13 == 0  # the first and the last column
    arrays = {name: array for name, array in (arrays | changed).items() if array is not None}
    np.savez_compressed(path, **arrays)
    return arrays


def together(arrays, kind):
    return np.concatenate([arrays[f"{part}_{kind}"] for part in chestmnist.PARTS])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small file in the place of the published one."""
    arrays = medmnist(tmp_path / "published.npz")
    monkeypatch.setattr(chestmnist, "MD5", chestmnist.check(tmp_path / "published.npz")["md5"])
    return arrays


def test_what_is_published():
    assert sorted(chestmnist.LABELS) == sorted(nih.FINDINGS)
    assert nih.ATTRIBUTION in chestmnist.ATTRIBUTION
    assert "CC BY 4.0" in chestmnist.ATTRIBUTION


def test_images_and_labels_arrive_unchanged(published, tmp_path):
    manifest = chestmnist.preprocess(tmp_path / "published.npz", tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(images, together(published, "images"))
    labels = together(published, "labels").astype(bool)
    for row, text in zip(labels, metadata["findings"], strict=True):
        found = {name for name, has in zip(chestmnist.LABELS, row, strict=True) if has}
        assert set(text.split("|")) == (found or {nih.NO_FINDING})
    assert metadata["findings"][1] == "Atelectasis|Hernia"
    assert metadata["split"].tolist() == ["train"] * 9 + ["test"] * 3
    assert metadata["image_id"].tolist()[6:8] == ["train_000006", "val_000000"]
    for name in chestmnist.UNKNOWN:
        assert metadata[name].isin(["", np.nan]).all(), name
    assert (manifest["split"]["train"], manifest["split"]["test"]) == (9, 3)
    assert manifest["source"]["published"]
    assert manifest["not_square"] == 0


def test_finished_work_is_not_done_again(published, tmp_path):
    path, out = tmp_path / "published.npz", tmp_path / "out"
    manifest = chestmnist.preprocess(path, out)
    before = (out / "images.npy").stat().st_mtime_ns
    assert chestmnist.preprocess(path, out) == manifest
    assert (out / "images.npy").stat().st_mtime_ns == before
    (out / "metadata.csv").unlink()
    assert chestmnist.preprocess(path, out) == manifest
    assert (out / "metadata.csv").exists()


def test_another_file_is_said_to_be_another(tmp_path):
    medmnist(tmp_path / "mine.npz")
    with pytest.warns(UserWarning, match=r"mine.npz is not the published file"):
        manifest = chestmnist.preprocess(tmp_path / "mine.npz", tmp_path / "out")
    assert not manifest["source"]["published"]


def test_pixels_never_lie_in_memory(tmp_path):
    images, labels = np.zeros((6000, 64, 64), np.uint8), np.zeros((6000, 14), np.uint8)
    medmnist(tmp_path / "big.npz", train_images=images, train_labels=labels)
    tracemalloc.start()
    with pytest.warns(UserWarning, match="not the published"):
        chestmnist.preprocess(tmp_path / "big.npz", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 2


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize(
    "changed",
    [
        {"val_labels": None},
        {"train_images": np.zeros((7, 28, 28), np.uint8)},
        {"train_images": np.zeros((7, 64, 64, 3), np.uint8)},
        {"train_images": np.zeros((7, 64, 64), np.float32)},
        {"train_images": np.asfortranarray(np.zeros((7, 64, 64), np.uint8))},
        {"test_labels": np.zeros((4, 14), np.uint8)},
        {"test_labels": np.full((3, 14), 2, np.uint8)},
        {"test_labels": np.array([[Boom()] * 14] * 3, object)},
    ],
)
def test_another_file_is_refused(changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    medmnist(tmp_path / "x.npz", **changed)
    with pytest.raises(ValueError, match=r"x\.npz is not ChestMNIST at 64x64"):
        chestmnist.check(tmp_path / "x.npz")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_a_damaged_file_is_read_rightly_or_refused(tmp_path):
    pixels = together(medmnist(tmp_path / "x.npz"), "images")
    content = (tmp_path / "x.npz").read_bytes()
    faults, places = [], range(0, len(content), len(content) // 30)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        (tmp_path / "x.npz").write_bytes(damaged)
        try:
            chestmnist.preprocess(tmp_path / "x.npz", tmp_path / "out")
            assert np.array_equal(data.load_images(tmp_path / "out"), pixels)
        except ValueError as error:
            faults.append(str(error))
    assert all("x.npz is" in fault for fault in faults)
    assert len(faults) > len(places) / 2
    (tmp_path / "x.npz").write_bytes(content[: len(content) // 2])
    for path in (tmp_path / "x.npz", tmp_path / "none.npz"):
        with pytest.raises(ValueError, match=path.name):
            chestmnist.check(path)
