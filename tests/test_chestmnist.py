"""ChestMNIST's file, small: checked, and written as the three files that everything else reads."""

import os

import numpy as np
import pytest

from lib import data
from lib.data import chestmnist, nih
from lib.data.preprocess import preprocess


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


def test_images_and_labels_arrive_unchanged(tmp_path, monkeypatch):
    path, out = tmp_path / "published.npz", tmp_path / "out"
    arrays = medmnist(path)
    with pytest.warns(UserWarning, match="published.npz is not the published file"):
        assert not preprocess(path, tmp_path / "other")["source"]["published"]
    monkeypatch.setattr(chestmnist, "MD5", chestmnist.check(path)["md5"])
    manifest = preprocess(path, out)
    images, metadata = data.load(out, verify=True)
    pixels, labels = (np.concatenate([*arrays.values()][k::2]) for k in (0, 1))  # of three parts
    np.testing.assert_array_equal(images, pixels)
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
    assert manifest["attribution"] == chestmnist.ATTRIBUTION
    before = (out / "images.npy").stat().st_mtime_ns
    assert preprocess(path, out) == manifest
    assert (out / "images.npy").stat().st_mtime_ns == before, "done again"


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("val_labels", None),
        ("train_images", np.zeros((7, 28, 28), np.uint8)),
        ("train_images", np.zeros((7, 64, 64), np.float32)),
        ("test_labels", np.zeros((4, 14), np.uint8)),
        ("test_labels", np.full((3, 14), 2, np.uint8)),
        ("test_labels", np.array([[Boom()] * 14] * 3, object)),
    ],
)
def test_another_file_is_refused(name, array, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    medmnist(tmp_path / "x.npz", **{name: array})
    with pytest.raises(ValueError, match=r"x\.npz is not ChestMNIST at 64x64"):
        chestmnist.check(tmp_path / "x.npz")
    assert not (tmp_path / "unpickled").exists()


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    medmnist(path)
    content = path.read_bytes()
    for place in range(99, len(content) - 999, len(content) // 9):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.npz is not ChestMNIST"):
            chestmnist.check(path)
    with pytest.raises(ValueError, match=r"no file .*none\.npz"):
        chestmnist.check(tmp_path / "none.npz")
