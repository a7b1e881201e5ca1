"""ChestMNIST-64: NIH's 112,120 X-rays at 64x64 as MedMNIST publishes them, without patients, views,
ages or sexes (J. Yang et al., MedMNIST v2, Scientific Data 10, 41, 2023).
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from lib import __version__, paths
from lib.data import nih, sha256

NAME = "chestmnist_64.npz"
BYTES = 401_604_127
MD5 = "9de6cd0b934ebb5b7426cfba5efbae16"
PAGE = "https://zenodo.org/records/10519652"
URL = f"{PAGE}/files/{NAME}?download=1"
PARTS = {"train": "train", "val": "train", "test": "test"}  # the file's three parts, and ours
UNKNOWN = ("patient_id", "view_position", "age", "sex")  # columns that stay empty
# The file's columns, in the order of medmnist/info.py; its "pleural" is Pleural_Thickening.
LABELS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
ATTRIBUTION = (
    "ChestMNIST: J. Yang et al., MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D "
    f"biomedical image classification, Scientific Data 10, 41, 2023; {PAGE}, CC BY 4.0; made from "
    f"NIH's chest X-rays. {nih.ATTRIBUTION}"
)
_SIZE = 64
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError)


def check(path: Path) -> dict[str, Any]:
    """Check that an ``.npz`` is ChestMNIST at 64x64; nothing in it is unpickled.

    It must hold ``train_images``, ``val_images`` and ``test_images``, uint8 (n, 64, 64), and
    ``*_labels``, (n, 14) of 0 and 1.

    Returns
    -------
    dict
        ``labels``: bool (n, 14) by part; ``images``: their number; ``md5``; ``published``: whether
        this is the file of the Zenodo record.

    Raises
    ------
    ValueError
        There is no such file, it is another one, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give {NAME} from {PAGE}")
    with open(path, "rb") as handle:
        md5 = hashlib.file_digest(handle, "md5").hexdigest()
    labels = {}
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            for part in PARTS:
                with archive.open(f"{part}_images.npy") as member:
                    count = _count(member)
                found = arrays[f"{part}_labels"]
                if found.shape != (count, len(LABELS)) or not np.isin(found, (0, 1)).all():
                    raise ValueError(f"{part}_labels is not ({count}, {len(LABELS)}) of 0 and 1")
                labels[part] = found.astype(bool)
    except _DAMAGED as error:
        raise ValueError(f"{path} is not ChestMNIST at 64x64 ({error}): see {PAGE}") from None
    images = sum(map(len, labels.values()))
    return {"labels": labels, "images": images, "md5": md5, "published": md5 == MD5}


def _count(member: IO[bytes]) -> int:
    """Number of images of an ``.npy``; what is read next are its pixels."""
    np.lib.format.read_magic(member)
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8 or shape[1:] != (_SIZE, _SIZE) or by_columns:
        raise ValueError(f"images are {dtype} {shape} and not uint8 (n, 64, 64)")
    return shape[0]


def findings_text(labels: np.ndarray) -> list[str]:
    """Text of each row of `labels`, bool (n, 14), as in NIH's table: ``Effusion|Mass``."""
    order = np.argsort(LABELS)
    names = np.array(LABELS)[order]
    return ["|".join(names[row]) or nih.NO_FINDING for row in labels[:, order]]


def preprocess(path: Path, out_dir: Path) -> dict[str, Any]:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from the ``.npz`` at `path`,
    pixels unchanged; return the manifest.

    The file's own split is used, and its ``val`` joins ``train``. MedMNIST keeps every patient on
    one side, which the file cannot show; NIH's official split is another one. Images are called
    ``train_000000`` and so on, since the file has no names.

    Raises
    ------
    ValueError
        Not such a file, or a damaged one.
    OSError
        `out_dir` is not writable or the disk is full; no file is left half-written.
    """
    facts = check(path)
    manifest_path, fingerprint = out_dir / "manifest.json", f"chestmnist {facts['md5']}"
    if manifest_path.is_file():
        manifest = paths.load_json(manifest_path)
        if manifest["fingerprint"] == fingerprint and all(
            (out_dir / name).is_file() for name in manifest["files"]
        ):
            return manifest
    manifest_path.unlink(missing_ok=True)  # it vouches for the other two, and comes last
    _write_images(path, out_dir / "images.npy", facts["images"])
    rows = [
        {"image_id": f"{part}_{k:06d}", "findings": text, "split": PARTS[part]}
        for part, labels in facts["labels"].items()
        for k, text in enumerate(findings_text(labels))
    ]
    frame = pd.DataFrame(rows).reindex(columns=list(nih.COLUMNS))
    with paths.atomic_write(out_dir / "metadata.csv", "w") as handle:
        frame.to_csv(handle, index=False, lineterminator="\n")
    manifest = {
        "source": {"kind": "chestmnist", "csv": None, "file": path.name}
        | {key: facts[key] for key in ("md5", "published")},
        "images": facts["images"],
        "size": _SIZE,
        "patients": None,
        "split": {
            "method": "ChestMNIST's own, val joins train; not NIH's lists; patients are not known",
            "seed": None,
        }
        | frame["split"].value_counts().to_dict(),
        "findings": dict(Counter("|".join(frame["findings"]).split("|")).most_common()),
        "files": {
            name: {"bytes": (out_dir / name).stat().st_size, "sha256": sha256(out_dir / name)}
            for name in ("images.npy", "metadata.csv")
        },
        "dropped": [],
        **dict.fromkeys(("not_square", "enlarged", "csv_rows"), 0),
        **dict.fromkeys(("csv_rows_without_image", "images_without_csv_row"), 0),
        "attribution": ATTRIBUTION,
        "versions": {"lib": __version__, "numpy": np.__version__},
        "fingerprint": fingerprint,
    }
    paths.save_json(manifest_path, manifest)
    if not facts["published"]:
        warnings.warn(f"{path.name} is not the published file: its MD5 is not {MD5}", stacklevel=3)
    return manifest


def _write_images(path: Path, target: Path, n: int) -> None:
    """Copy the pixels of all parts into one ``.npy``; they never lie in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, _SIZE, _SIZE)}
    try:
        with zipfile.ZipFile(path) as archive, paths.atomic_write(target) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            for part in PARTS:
                with archive.open(f"{part}_images.npy") as member:
                    _count(member)
                    shutil.copyfileobj(member, handle)
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}): take {NAME} from {PAGE}") from None
