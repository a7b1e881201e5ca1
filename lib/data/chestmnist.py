"""ChestMNIST-64: NIH's 112,120 X-rays at 64x64 as MedMNIST publishes them, without patients, views,
ages or sexes.

J. Yang et al., MedMNIST v2, Scientific Data 10, 41 (2023). The file is read as a stream, so that
its 459 MB of pixels never lie in memory."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
from tqdm import tqdm

from lib import __version__, paths

NAME = "chestmnist_64.npz"
BYTES = 401_604_127
MD5 = "9de6cd0b934ebb5b7426cfba5efbae16"
RECORD = 10519652
PAGE = f"https://zenodo.org/records/{RECORD}"
URL = f"{PAGE}/files/{NAME}?download=1"
PARTS = {"train": "train", "val": "train", "test": "test"}  # the file's three parts, and ours
# In the order of the columns, as MedMNIST's medmnist/info.py names them ("pleural" is
# Pleural_Thickening)
LABELS = (
    *(
        "Atelectasis",
        "Cardiomegaly",
        "Effusion",
        "Infiltration",
        "Mass",
        "Nodule",
        "Pneumonia",
        "Pneumothorax",
    ),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
ATTRIBUTION = (
    "ChestMNIST: J. Yang et al., MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D biomedical image classification, "
    f"Scientific Data 10, 41, 2023; {PAGE}, CC BY 4.0; made from NIH's chest X-rays. "
)
UNKNOWN = (
    "patient_id",
    "view_position",
    "age",
    "sex",
)  # columns that stay empty: the file does not hold them

_FORMAT = 1  # raise it when the same input would give other files
_SIZE = 64
_BLOCK = 1024  # images at a time, 4 MB


def request() -> requests.PreparedRequest:
    """The request that yields the published file."""
    return requests.Request("GET", URL).prepare()


def is_npz(path: str | Path) -> bool:
    """Whether a path is named as such a file is."""
    return str(path).lower().endswith(".npz")


def check(path: Path) -> dict[str, Any]:
    """Check that a file is ChestMNIST at 64x64, with little memory and without unpickling anything.

    Parameters
    ----------
    path : Path
        An ``.npz`` with ``train_images``, ``val_images`` and ``test_images``, uint8 (n, 64, 64),
        and ``*_labels``, (n, 14) of 0 and 1.

    Returns
    -------
    dict
        ``counts``, images of each part; ``md5``; ``published``, whether it is the file of the
        Zenodo record.

    Raises
    ------
    ValueError
        It is not such a file, or is damaged: the message names what differs.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: give {NAME} from {PAGE}, or --data chestmnist to have it downloaded"
        )
    with open(path, "rb") as handle:
        md5 = hashlib.file_digest(handle, "md5").hexdigest()
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [f"{part}_{kind}.npy" for part in PARTS for kind in ("images", "labels")]
            names = archive.namelist()
            if sorted(names) != sorted(wanted):
                raise ValueError(
                    f"it holds {', '.join(sorted(names))[:200]} and not {', '.join(sorted(wanted))}"
                )
            counts = {}
            for part in PARTS:
                shape, _, _ = _header(archive, f"{part}_images")
                labels, _, _ = _header(archive, f"{part}_labels")
                if shape[1:] != (_SIZE, _SIZE):
                    raise ValueError(
                        f"{part}_images is {shape} and not (n, 64, 64): take {NAME}, of 64x64"
                    )
                if labels != (shape[0], len(LABELS)):
                    raise ValueError(f"{part}_labels is {labels} and not {(shape[0], len(LABELS))}")
                counts[part] = shape[0]
        if not counts["train"]:
            raise ValueError("its train_images is empty")
        for part in PARTS:
            _labels(path, part)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        RuntimeError,
        OSError,
        ValueError,
    ) as error:
        again = (
            f"; delete it and download it again from {PAGE}"
            if path.name == NAME
            else f"; give {NAME} from {PAGE}"
        )
        raise ValueError(f"{path} is not ChestMNIST at 64x64 ({error}){again}") from None
    return {"counts": counts, "md5": md5, "published": md5 == MD5}


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and offset of the data of a member, and that it is as long as its header says."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"{name} is written in format {version}")
        shape, columns_first, dtype = read(member)
        offset = member.tell()
    if name.endswith("images") and dtype != np.uint8:
        raise ValueError(f"{name} is {dtype} and not uint8")
    if dtype.kind not in "uib":
        raise ValueError(f"{name} is {dtype} and not of whole numbers")
    if columns_first and len(shape) > 1:
        raise ValueError(f"{name} is stored column by column")
    if info.file_size != offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(
            f"{name} is {info.file_size - offset:,} bytes long, which is not what {shape} of {dtype} takes"
        )
    return shape, dtype, offset


def _labels(path: Path, part: str) -> np.ndarray:
    """Labels of a part, bool (n, 14); ValueError unless all are 0 or 1."""
    with np.load(path, allow_pickle=False) as arrays:
        labels = arrays[f"{part}_labels"]
    odd = (labels != 0) & (labels != 1)
    if odd.any():
        raise ValueError(f"{part}_labels holds {labels[odd][0]}, and not only 0 and 1")
    return labels.astype(bool)


def _blocks(path: Path, part: str) -> Iterator[bytes]:
    """Pixels of a part in its order, some images at a time; the zip's checksum is verified at the
    end.
    """
    with zipfile.ZipFile(path) as archive:
        _, _, offset = _header(archive, f"{part}_images")
        with archive.open(f"{part}_images.npy") as member:
            member.read(offset)
            while block := member.read(_BLOCK * _SIZE * _SIZE):
                yield block


def findings_text(labels: np.ndarray) -> list[str]:
    """NIH's own text of each row: findings in alphabetical order joined by ``|``, or ``No
    Finding``, which is what NIH's table says there.

    Parameters
    ----------
    labels : ndarray bool, shape (n, 14)
        In the order of `LABELS`.
    """
    order = np.argsort(LABELS)
    names = [LABELS[column] for column in order]
    return [
        "|".join(name for name, has in zip(names, row, strict=True) if has) or "No Finding"
        for row in labels[:, order].tolist()
    ]


def preprocess(path: Path, out_dir: Path, size: int = _SIZE, resume: bool = True) -> dict[str, Any]:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from the file, pixels unchanged;
    see `lib.data.preprocess`.

    Its own split is used, and its ``val`` joins ``train``. It is known to keep every patient on one
    side, which the file itself cannot show, and is not NIH's official one, whose test part has
    25,596 images. Images are called ``train_000000`` and so on by part and place, since the file
    has no names. The columns of `UNKNOWN` stay empty.

    Parameters
    ----------
    path : Path
        The ``.npz``.
    out_dir : Path
    size : int
        64; the file has no other.
    resume : bool
        False: do all the work again.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    ValueError
        Not such a file, or another `size`.
    OSError
        `out_dir` not writable or disk full; no file is left half-written.
    """
    from lib import data  # it hands over to this module

    if size != _SIZE:
        raise ValueError(
            f"ChestMNIST-64 has 64x64 pixels and cannot give {size=}: use --data kaggle or nih:PATH for that"
        )
    facts = check(path)
    counts = facts["counts"]
    fingerprint = hashlib.sha256(
        json.dumps(["chestmnist", _FORMAT, facts["md5"]]).encode()
    ).hexdigest()
    manifest_path = out_dir / "manifest.json"
    if resume and manifest_path.is_file():
        manifest = paths.load_json(manifest_path)
        if manifest.get("fingerprint") == fingerprint and all(
            (out_dir / name).is_file() and (out_dir / name).stat().st_size == file["bytes"]
            for name, file in manifest["files"].items()
        ):
            return manifest
    manifest_path.unlink(missing_ok=True)  # it vouches for the other two, and comes last
    total = sum(counts.values())
    try:
        with (
            paths.atomic_write(out_dir / "images.npy") as handle,
            tqdm(total=total, desc="preprocess", unit="image", mininterval=0.5) as bar,
        ):
            np.lib.format.write_array_header_1_0(
                handle, {"descr": "|u1", "fortran_order": False, "shape": (total, _SIZE, _SIZE)}
            )
            for part in PARTS:
                for block in _blocks(path, part):
                    handle.write(block)
                    bar.update(len(block) // _SIZE**2)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again from {PAGE}") from None
    findings = [text for part in PARTS for text in findings_text(_labels(path, part))]
    frame = pd.DataFrame("", index=range(total), columns=list(data.COLUMNS))
    frame["image_id"] = [f"{part}_{place:06d}" for part in PARTS for place in range(counts[part])]
    frame["findings"] = findings
    frame["split"] = [side for part, side in PARTS.items() for _ in range(counts[part])]
    with paths.atomic_write(out_dir / "metadata.csv", "w") as handle:
        frame.to_csv(handle, index=False, lineterminator="\n")
    manifest = {
        "format": _FORMAT,
        "source": {
            "kind": "chestmnist",
            "csv": None,
            "file": path.name,
            "md5": facts["md5"],
            "published": facts["published"],
        },
        "images": total,
        "size": _SIZE,
        "patients": None,
        "unknown": {name: "ChestMNIST does not hold it" for name in UNKNOWN},
        "split": {
            "method": "ChestMNIST's own, its val joins train; not NIH's lists; that no patient is in both parts cannot be seen",
            "seed": None,
            "train": counts["train"] + counts["val"],
            "test": counts["test"],
            "of_these_val": counts["val"],
        },
        "findings": dict(Counter("|".join(findings).split("|")).most_common()),
        "files": {},
        "dropped": [],
        "image_modes": {"L": total},
        "not_square_stretched": 0,
        "enlarged": 0,
        "csv_rows": 0,
        "csv_rows_without_image": 0,
        "images_without_csv_row": 0,
        "attribution": attribution(),
        "versions": {"python": platform.python_version(), "lib": __version__}
        | {p.__name__: p.__version__ for p in (np, pd)},
        "fingerprint": fingerprint,
    }
    for name in ("images.npy", "metadata.csv"):
        with open(out_dir / name, "rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        manifest["files"][name] = {"bytes": (out_dir / name).stat().st_size, "sha256": sha256}
    paths.save_json(manifest_path, manifest)
    if not facts["published"]:
        warnings.warn(
            f"{path.name} is not the published file (MD5 {facts['md5']}, not {MD5}); its arrays and labels are sound",
            stacklevel=3,
        )
    return manifest


def attribution() -> str:
    """ChestMNIST's own attribution and licence, and NIH's."""
    from lib import data

    return ATTRIBUTION + data.ATTRIBUTION
