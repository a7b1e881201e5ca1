"""X-rays in: sources, the reader of folders, and the three files that everything else reads.

`lib.data.sources` obtains X-rays, `lib.data.preprocess` turns them into ``images.npy``,
``metadata.csv`` and ``manifest.json``. This module reads them: `load_images` for training, which
must see no label, and `load` for evaluation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib import paths
from lib.data import nih


def load_images(dataset_dir: str | os.PathLike, verify: bool = False) -> np.ndarray:
    """Open ``images.npy``, and no other file: training must not see labels.

    Parameters
    ----------
    dataset_dir : path
        Where `lib.data.preprocess` wrote.
    verify : bool
        Compare the file's SHA-256 with the manifest (this opens ``manifest.json``).

    Returns
    -------
    memmap, shape (N, 64, 64), uint8, 0..255
        Read-only, in the order of ``metadata.csv``.

    Raises ValueError if the file is missing, is no such array, or is not that of the manifest.
    """
    path = _written(dataset_dir, "images.npy", verify)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{paths.show(path)} is no array ({error}): run 01_preprocess") from error
    if images.dtype != np.uint8 or images.shape[1:] != (64, 64) or not len(images):
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"{paths.show(path)} is {found}, not uint8 (N, 64, 64): run 01_preprocess")
    return images


def load(dataset_dir: str | os.PathLike, verify: bool = False) -> tuple[np.ndarray, pd.DataFrame]:
    """Open the images with what is known of them; parameters and errors as for `load_images`.

    Returns
    -------
    images : memmap, shape (N, 64, 64), uint8
    metadata : DataFrame, N rows
        image_id, patient_id, findings, view_position, sex, split: text, empty if unknown, never
        NaN. age: float64, years, NaN if unknown. Further columns (of phantoms) are bool, float64 or
        text, as their values are.
    """
    images = load_images(dataset_dir, verify)
    path = _written(dataset_dir, "metadata.csv", verify)
    try:
        metadata = pd.read_csv(path, dtype=str, na_filter=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{paths.show(path)} is no CSV ({error}): run 01_preprocess") from error
    missing = [name for name in nih.COLUMNS if name not in metadata]
    if missing or len(metadata) != len(images):
        lacks = f"has no column {', '.join(missing)}" if missing else f"has {len(metadata)} rows"
        raise ValueError(f"{paths.show(path)} {lacks} ({len(images)} images): run 01_preprocess")
    for name in metadata.columns.difference(nih.COLUMNS).union(["age"]):
        numbers = pd.to_numeric(metadata[name], errors="coerce").astype("float64")
        if metadata[name].isin(["True", "False"]).all():
            metadata[name] = metadata[name] == "True"
        elif name == "age" or numbers.notna().all():
            metadata[name] = numbers
    return images, metadata


def _written(dataset_dir: str | os.PathLike, name: str, verify: bool) -> Path:
    """Path of a file that `lib.data.preprocess` wrote; ValueError if it is absent or changed."""
    path, manifest = Path(dataset_dir) / name, Path(dataset_dir) / "manifest.json"
    if not path.is_file() or (verify and not manifest.is_file()):
        absent = manifest if path.is_file() else path
        raise ValueError(f"there is no {paths.show(absent)}: run 01_preprocess")
    if verify and sha256(path) != paths.load_json(manifest)["files"][name]["sha256"]:
        raise ValueError(f"{paths.show(path)} is not the file of its manifest: run 01_preprocess")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def patient_groups(metadata: pd.DataFrame) -> np.ndarray:
    """Which images belong together, (N,) of str: the patient, or the image alone if unknown."""
    patients = metadata["patient_id"].fillna("").astype(str).to_numpy()
    return np.where(patients == "", [f"image {i}" for i in range(len(patients))], patients)


def count_patients(metadata: pd.DataFrame) -> int:
    """Number of known patients. An image whose patient_id is its image_id has an unknown one."""
    known = metadata["patient_id"].fillna("")
    return known[(known != "") & (known != metadata["image_id"])].nunique()


def label_set(metadata: pd.DataFrame) -> tuple[str, ...]:
    """Labels that occur, without "No Finding": in NIH's order if all are NIH's, else sorted."""
    names = set("|".join(metadata["findings"]).split("|")) - {"", nih.NO_FINDING}
    return tuple(sorted(names))  # NIH's own order is the alphabet


def finding_matrix(findings: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """Which of F `names` each of N images has, (N, F) bool.

    `findings` are N texts of labels joined by ``|``; labels that are not in `names` set nothing.
    """
    has = [set(text.split("|")) for text in findings]
    matrix = [[name in labels for name in names] for labels in has]
    return np.array(matrix, bool).reshape(len(has), len(names))


def label_combinations(findings: Iterable[str]) -> np.ndarray:
    """Class of each image, (N,) int64, if every distinct text is a class, as in the published
    evaluation: 0..C-1 in the alphabetical order of the texts; -1 for empty text, which is no label.
    """
    texts = list(findings)
    codes = {text: code for code, text in enumerate(sorted(set(texts) - {""}))} | {"": -1}
    return np.array([codes[text] for text in texts], dtype=np.int64)
