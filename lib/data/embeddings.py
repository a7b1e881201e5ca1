"""Embeddings that a network elsewhere has made, one per image, in place of the images.

A file of them, ``.npz`` or ``.parquet``, holds ``embeddings`` (N, D) and, if known, columns of N:
``ids``, ``labels`` (joined by ``|``), ``patients``, ``split``, ``paths`` of pictures, and any of
the names that a table of X-rays may have, such as ``view_position``, ``age`` and ``sex``."""

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import paths
from lib.data import decode, finished, load_metadata, save, sha256, tables

NAME = "embeddings.npy"
RENAMED = {"ids": "image_id", "labels": "findings", "patients": "patient_id"}
ATTRIBUTION = "Embeddings of the user's own file, under their own terms. Not for clinical use."


def read(path: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Embeddings of a file, float32 (N, D), and all else that it says, N rows of text. ValueError
    if it is no such file; nothing in it is unpickled."""
    try:
        if path.suffix.lower() == ".parquet":
            columns = {name: column.to_numpy() for name, column in pd.read_parquet(path).items()}
            columns["embeddings"] = np.stack(columns["embeddings"])
        else:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                columns = dict(arrays)
        points = columns.pop("embeddings").astype(np.float32)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path.name} holds no `embeddings`: {error!r:.200}") from None
    if points.ndim != 2 or not points.size:
        raise ValueError(f"`embeddings` in {path.name} must be (N, D), not {points.shape}")
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        raise ValueError(f"row {bad[0]} of `embeddings` in {path.name} is not finite")
    wrong = {name: some.shape for name, some in columns.items() if some.shape != points.shape[:1]}
    if wrong:
        fault = f"{path.name} has {len(points)} rows, but columns of other shapes: {wrong}"
        raise ValueError(fault)
    cells = pd.DataFrame({name: map(_text, some) for name, some in columns.items()}, dtype=str)
    return points, cells.rename(columns=RENAMED)


def _text(value) -> str:
    """A cell as text: labels in a list are joined, None and NaN are empty."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "|".join(map(str, value))
    return "" if pd.isna(value) else str(value).strip()


def preprocess(path: str | os.PathLike, out_dir: str | os.PathLike, split_seed: int = 0) -> dict:
    """Write ``embeddings.npy``, ``metadata.csv`` and ``manifest.json`` from a file of embeddings.

    Rows stay in their order. The file's own ``split`` is kept if it names train and test; else
    patients are drawn, as of X-rays (`lib.data.tables.split_patients`). Returns the manifest.
    ValueError if the file is none of embeddings, or ids are not unique."""
    path, out_dir = Path(path), Path(out_dir)
    fingerprint = f"embeddings {sha256(path)} {split_seed}"
    if manifest := finished(out_dir, fingerprint):
        return manifest
    points, cells = read(path)
    n = len(points)
    ids = cells.get("image_id", pd.Series([f"row-{row:06d}" for row in range(n)]))
    ids = ids.map(tables.printable)
    if not ids.is_unique or (ids == "").any():
        one = ids[ids.duplicated() | (ids == "")].iloc[0]
        raise ValueError(f"`ids` in {path.name} must be unique and not empty: see {one!r}")
    lists = dict(zip(ids, cells.pop("split").str.lower(), strict=True)) if "split" in cells else {}
    lists = {name: "test" if part == "test" else "train" for name, part in lists.items() if part}
    cells = cells.assign(image_id=ids, findings=cells.get("findings", pd.Series([""] * n)))
    table, counts = tables.clean(cells, path.name)
    frame = tables.join({i: {} for i in ids}, table, {name: [row] for row, name in enumerate(ids)})
    frame, split = tables.split_patients(frame, lists, split_seed)
    split["method"] = split["method"].replace("NIH's lists", "the file's own")
    source = {"kind": "embeddings", "csv": None, "file": path.name}
    manifest = {"source": source, "size": points.shape[1], "split": split}
    manifest |= {"attribution": ATTRIBUTION, "fingerprint": fingerprint}
    with paths.alone(out_dir):
        return save(out_dir / ".partial-embeddings", manifest | counts, frame, points, NAME)


def load(dataset_dir: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """What `preprocess` wrote: embeddings, float32 (N, D), and what is known of each row."""
    points = np.load(dataset_dir / NAME, mmap_mode="r", allow_pickle=False)
    return points, load_metadata(dataset_dir, len(points))


def pictures(path: Path | str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of some rows (M,) of a file of embeddings, uint8 (M, 64, 64), and which are there,
    bool (M,); what is not there is black.

    Its column ``paths`` names PNG, JPEG or DICOM files, relative to its folder or absolute. Without
    it there are none; a warning names the first that cannot be read."""
    path, black = Path(path).absolute(), np.zeros((decode.SIZE, decode.SIZE), np.uint8)
    names = read(path)[1].get("paths", pd.Series("", range(max(rows) + 1))).iloc[rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings(action="ignore"):
        found = list(pool.map(decode.decode, [path.parent / name for name in names]))
    pictured = np.array([picture is not None for picture, _ in found])
    if len(bad := np.flatnonzero(~pictured & (names != ""))):
        text = f"{len(bad)} of {len(rows)} pictures that {path.name} names cannot be read"
        first = f"{names.iloc[bad[0]]!r}: {found[bad[0]][1]['reason']}"
        warnings.warn(f"{text} ({first}); correct `paths`", stacklevel=2)
    return np.stack([black if picture is None else picture for picture, _ in found]), pictured


def read_clusters(path: Path | str, images_file: Path | str, config: Any) -> np.ndarray:
    """Cluster of each of N images, int64 (N,), of a clustering from elsewhere, to train on with
    `config` (`lib.runs.TrainConfig`): whole numbers from 0 to K - 1, or any of patients.

    `path` is an .npy or an .npz of one array, in the order of the images; or a .csv, of which the
    first column besides ``image_id`` is read. With that column, ``metadata.csv`` beside the images
    says which row is whose. ValueError that names file and value if the numbers do not fit."""
    path, n = Path(path), len(np.load(images_file, mmap_mode="r", allow_pickle=False))
    try:
        if path.suffix.lower() == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            if "image_id" in table:
                names = load_metadata(Path(images_file).parent, n)["image_id"]
                table = table.set_index("image_id").loc[names]
            values = table.iloc[:, 0].to_numpy()
        else:
            with open(path, "rb") as handle:
                values = np.load(handle, allow_pickle=False)
                (values,) = [values] if isinstance(values, np.ndarray) else dict(values).values()
        numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(float)
    except Exception as error:  # a damaged file may raise anything
        text = f"{path.name} has no number for each image: {error!r:.200}"
        raise ValueError(f"{text}; give an .npy, an .npz of one array, or a .csv") from None
    if len(numbers) != n:
        text = f"{path.name} has {len(numbers)} numbers for {n} images"
        raise ValueError(f"{text}: give each one (the first line of a .csv is its head)")
    most = 2**53 if config.pseudo_labels == "patients" else config.n_clusters - 1
    bad = np.flatnonzero(~((numbers >= 0) & (numbers <= most) & (numbers % 1 == 0)))
    if len(bad):
        text = f"{path.name} has {values[bad[0]]} for image {bad[0]}"
        raise ValueError(f"{text}: give whole numbers from 0 to n_clusters - 1, here {most}")
    return numbers.astype(np.int64)
