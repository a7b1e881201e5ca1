"""X-rays in: obtain a source, read any NIH-like folder, and write the three files that everything else reads.

``fetch`` fills ``data/raw/<dataset>``, ``preprocess`` turns it into ``images.npy``, ``metadata.csv`` and ``manifest.json``, and
``load_images`` (training, which must see no label) and ``load`` (evaluation) read them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import PIL
from PIL import Image, ImageFile, ImageOps
from tqdm import tqdm

from lib import __version__, paths, phantom

FINDINGS = phantom.FINDINGS  # NIH's 14, in alphabetical order
ATTRIBUTION = (
    "Chest X-rays: NIH Clinical Center, the data provider. X. Wang et al., ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks "
    "on Weakly-Supervised Classification and Localization of Common Thorax Diseases, CVPR 2017, pp. 3462-3471. "
    "Download: https://nihcc.app.box.com/v/ChestXray-NIHCC. Not for clinical use."
)
PHANTOM_ATTRIBUTION = "Synthetic radiographs drawn by lib.phantom of this project; they show no patient. Not for clinical use."
FOLDER_ATTRIBUTION = "Images of the user's own folder, under their own terms. Not for clinical use."

COLUMNS = ("image_id", "patient_id", "findings", "view_position", "age", "sex", "split")
EXTRA_COLUMNS = ("side", "angle", "mirrored")  # ground truth that only phantoms have
MAX_PIXELS = 2**26  # 8192 x 8192; the largest original radiograph has about 3000 x 3000

_FORMAT = 1  # raise it when the same input would give other files: finished and half-finished work is then redone
_CHUNK = 256  # images between two savings of the work
_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)
_NIH_NAME = re.compile(r"(\d{8})_(\d{3})\.(png|jpe?g)", re.IGNORECASE)
_METADATA_NAMES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
_LIST_NAMES = {"train_val_list.txt": "train", "test_list.txt": "test"}
# Headers as lower-case letters only: "Patient Sex", "patient_sex" and "PatientSex" are one name.
_HEADERS = {
    "image_id": ("imageindex", "imageid", "image", "imagename", "filename", "file", "imagepath", "path"),
    "findings": ("findinglabels", "findings"),
    "patient_id": ("patientid",),
    "view_position": ("viewposition",),
    "age": ("patientage", "age"),
    "sex": ("patientsex", "patientgender", "sex", "gender"),
    **{name: (name,) for name in EXTRA_COLUMNS},
}
_KNOWN = {name.lower(): name for name in (*FINDINGS, "No Finding")} | {"infiltrate": "Infiltration"}
_HOW_TO_OBTAIN = (
    "(1) get nih-chest-xrays/data from https://www.kaggle.com/datasets/nih-chest-xrays/data (45 GB, free account), or the images and "
    "Data_Entry_2017 from NIH at https://nihcc.app.box.com/v/ChestXray-NIHCC; (2) unpack it into one folder; "
    "(3) run with --data PATH of that folder"
)


# ---------------------------------------------------------------------------------------------------------------- obtain


def fetch(
    source: str | os.PathLike, raw_dir: str | os.PathLike, n_phantoms: int = 256, seed: int = 0, orientation: str = "upright"
) -> dict[str, Any]:
    """Put a source of X-rays into place for `preprocess`.

    Parameters
    ----------
    source : str or path
        ``"phantom"``: draw phantoms and write them in Kaggle's own layout, so that they pass through the reader that real X-rays pass
        through. Otherwise a folder with images, which stays where it is: only a note of it is written.
    raw_dir : path
        Folder of this source, usually ``paths.raw_dir(dataset)``.
    n_phantoms, seed : int
        Number of phantoms and their seed. Phantoms that are there already with the same number and seed are kept.
    orientation : {"upright", "any"}
        How phantoms hang, see `lib.phantom.make_phantoms`.

    Returns
    -------
    dict
        For display: kind, images, csv, folder and attribution; no path of this machine.

    Raises
    ------
    ValueError
        `source` is no folder or has no images, or `raw_dir` holds something that is not ours to replace.
    """
    raw_dir = Path(raw_dir)
    if source == "phantom":
        note = _fetch_phantoms(raw_dir, int(n_phantoms), int(seed), orientation)
        return _shown(note, raw_dir, _METADATA_NAMES[0])
    folder = Path(source).expanduser()
    if not folder.exists() and str(source).lower().partition(":")[0] in {"kaggle", "kaggle-sample", "nih", "chestmnist"}:
        raise ValueError(f"--data {source} cannot be downloaded for you. {_HOW_TO_OBTAIN}")
    files = _walk(folder)
    images, _ = _find_images(folder, files)
    table = _find_metadata(folder, files)
    note = {"kind": _kind(images), "path": str(folder.resolve()), "images": len(images)}
    paths.save_json(raw_dir / "source.json", note)
    return _shown(note, folder, table.name if table else None)


def _shown(note: dict[str, Any], folder: Path, table: str | None) -> dict[str, Any]:
    """A note on a source as it may stand in a notebook."""
    kind = note["kind"]
    return {"kind": kind, "images": note["images"], "csv": table, "folder": paths.show(folder), "attribution": _attribution(kind)}


def _fetch_phantoms(raw_dir: Path, n: int, seed: int, orientation: str) -> dict[str, Any]:
    # The generator is part of the identity: phantoms of an older version of it are drawn again.
    generator = hashlib.sha256(Path(phantom.__file__).read_bytes()).hexdigest()
    note = {"kind": "phantom", "images": n, "seed": seed, "generator": generator}
    note |= {} if orientation == "upright" else {"orientation": orientation}
    there = _read_source(raw_dir)
    if there == note:
        return note
    if raw_dir.exists() and (there or {}).get("kind") != "phantom" and {path.name for path in raw_dir.iterdir()} - {"source.json"}:
        raise ValueError(f"{paths.show(raw_dir)} holds files which are not phantoms: move them away, or choose another dataset name")

    images, table = phantom.make_phantoms(n, seed, orientation)
    # Built beside its place and moved there when whole; what a killed run left behind goes first.
    building, old = (raw_dir.with_name(f".{raw_dir.name}.{end}") for end in ("partial", "old"))
    with _naming_disk_errors(raw_dir):
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)
        for place, (image_id, image) in enumerate(zip(table["image_id"], images, strict=True)):
            file = building / f"images_{place // 10_000 + 1:03d}" / "images" / image_id  # 10,000 a folder, as on Kaggle
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        with open(building / _METADATA_NAMES[0], "w", encoding="utf-8", newline="\n") as handle:
            _kaggle_table(table, images.shape[1:]).to_csv(handle, index=False, lineterminator="\n")
        paths.save_json(building / "source.json", note)
        if raw_dir.exists():
            os.replace(raw_dir, old)
        os.replace(building, raw_dir)
        shutil.rmtree(old, ignore_errors=True)
    return note


def _kaggle_table(table: pd.DataFrame, shape: tuple[int, int]) -> pd.DataFrame:
    """Phantoms under Kaggle's header; its unquoted ``OriginalImage[Width,Height]`` is two columns to every reader."""
    columns = {
        "Image Index": table["image_id"],
        "Finding Labels": table["findings"],
        "Follow-up #": table.groupby("patient_id").cumcount(),
        "Patient ID": table["patient_id"],
        "Patient Age": table["age"],
        "Patient Gender": table["sex"],
        "View Position": table["view_position"],
        "OriginalImage[Width": shape[1],
        "Height]": shape[0],
        "OriginalImagePixelSpacing[x": "",
        "y]": "",
    }
    return pd.DataFrame(columns | {name: table[name] for name in EXTRA_COLUMNS})


@contextmanager
def _naming_disk_errors(path: Path) -> Iterator[None]:
    """What `paths.atomic_write` says of a full or unwritable disk, for writing that cannot go through it."""
    try:
        yield
    except OSError as error:
        hint = "free some space, or choose another folder with CXR_DATA_DIR"
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}; {hint}") from error


def _read_source(folder: Path) -> dict[str, Any] | None:
    """The note that `fetch` left in `folder`, if it is one of ours."""
    note = folder / "source.json"
    if not note.is_file():
        return None
    content = paths.load_json(note)
    return content if isinstance(content, dict) and content.get("kind") in ("phantom", "nih", "folder") else None


def _kind(images: dict[str, str]) -> str:
    """``"nih"`` if more than half of the images are named as NIH names them, else ``"folder"``: it decides whose attribution is given."""
    named = sum(_NIH_NAME.fullmatch(image_id) is not None for image_id in images)
    return "nih" if 2 * named > len(images) else "folder"


def _attribution(kind: str) -> str:
    return {"phantom": PHANTOM_ATTRIBUTION, "nih": ATTRIBUTION}.get(kind, FOLDER_ATTRIBUTION)


# ------------------------------------------------------------------------------------------------------------ find files


def _walk(folder: Path) -> list[str]:
    """Relative paths (``/``) of all files in `folder`, sorted, without hidden ones, macOS resource forks and linked folders."""
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}: give --data phantom, or --data PATH of a folder with X-rays")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: unpack it if it is an archive, and give the folder")

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}; make it readable or move it away")

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        prefix = (Path(root).relative_to(folder) / "_").as_posix()[:-1]
        found += [prefix + name for name in names if not name.startswith(".")]
    return sorted(found)


def _find_images(folder: Path, files: list[str]) -> tuple[dict[str, str], list[str]]:
    """Images by image_id (the file name) in order of image_id, and the files left out because their name was there before.

    Raises ValueError if there is no image, or if names repeat so much that they cannot be identities.
    """
    images: dict[str, str] = {}
    repeated = []
    for file in files:
        if _IMAGE_SUFFIX.search(file):
            image_id = _printable(file.rpartition("/")[2])
            if image_id in images:
                repeated.append(file)
            else:
                images[image_id] = file
    if not images:
        kinds = Counter(PurePosixPath(file).suffix.lower() or "no extension" for file in files)
        held = "holds no .png, .jpg or .jpeg but " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(4)) if files else "is empty"
        raise ValueError(f"no images in {folder}: it {held}; give a folder with X-rays, or --data phantom")
    if len(repeated) > len(images):
        raise ValueError(
            f"only {len(images)} different file names among {len(images) + len(repeated)} images in {folder} "
            f"(for example {_printable(repeated[0])}): images are told apart by file name; rename them, say to <patient>_<number>.png"
        )
    return dict(sorted(images.items())), repeated


def _find_metadata(folder: Path, files: list[str]) -> Path | None:
    """The CSV with the findings: one of NIH's names, else the only CSV that has an image column."""
    tables = [file for file in files if file.lower().endswith(".csv")]
    for known in _METADATA_NAMES:
        named = [file for file in tables if PurePosixPath(file).name.lower() == known.lower()]
        if named:
            return folder / min(named, key=lambda file: (file.count("/"), file))
    candidates = {}
    for file in tables:
        try:
            header = (_rows(folder / file) or [[]])[0]
        except ValueError:
            continue
        boxes = any("bbox" in name.lower() for name in header)  # BBox_List_2017.csv
        if not boxes and "image_id" in (roles := _roles(header)):
            candidates[file] = "findings" in roles
    if len(candidates) > 1:  # a table of sizes or boxes beside the one with the findings
        candidates = {file: True for file, labelled in candidates.items() if labelled} or candidates
    if len(candidates) > 1:
        names = ", ".join(map(_printable, candidates))
        raise ValueError(f"{len(candidates)} CSV files could describe the images ({names}): leave one, or name it {_METADATA_NAMES[0]}")
    return folder / next(iter(candidates)) if candidates else None


# --------------------------------------------------------------------------------------------------------- read metadata


def read_metadata(folder: str | os.PathLike) -> pd.DataFrame | None:
    """Read the table that describes the X-rays in a folder.

    Understands NIH's files of 2017 and 2020, that of Kaggle's sample, and any single CSV with an image column and ``Finding Labels``, in
    any order of columns: empty or surplus columns, blank cells, ages such as ``060Y`` and ``007M``, sex or gender, names in any case.

    Parameters
    ----------
    folder : path
        Folder with the X-rays; it is searched with all folders below it.

    Returns
    -------
    DataFrame or None
        One row an image: image_id (file name), patient_id (text, leading zeros of numbers removed), findings (joined by ``|``, empty
        where unlabelled), view_position and sex (empty where unknown), age (float, completed years, NaN where unknown or over 120), and
        side, angle, mirrored where the table has them. None if the folder has no such table.

    Raises
    ------
    ValueError
        The table has no image column or no ``Finding Labels``, or is not CSV text in UTF-8.
    """
    folder = Path(folder)
    table = _find_metadata(folder, _walk(folder))
    return None if table is None else _typed(_read_table(table)[0])


def _rows(table: Path) -> list[list[str]]:
    """Rows of a CSV. The csv module and not pandas: rows may be longer or shorter than the header, and no text is turned into NaN."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as handle:
            return list(csv.reader(handle))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table.name} is not CSV text in UTF-8 ({error}): save it again as such") from error
    except OSError as error:
        raise ValueError(f"cannot read {table.name}: {error.strerror}") from error


def _roles(header: list[str]) -> dict[str, int]:
    """Where each of our columns stands in `header`."""
    letters = [re.sub("[^a-z]", "", name.lower()) for name in header]
    found = {role: [letters.index(alias) for alias in aliases if alias in letters] for role, aliases in _HEADERS.items()}
    return {role: places[0] for role, places in found.items() if places}


def _read_table(table: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """All columns as text, one row an image, and counts of what was odd."""
    header, *rows = _rows(table) or [[]]
    roles = _roles(header)
    for role, name in (("image_id", "Image Index"), ("findings", "Finding Labels")):
        if role not in roles:
            columns = ", ".join(filter(None, header)) or "none"
            raise ValueError(f"{table.name} has no column '{name}' (it has: {columns}): rename the one that holds it, or remove the file")
    unknown: Counter[str] = Counter()
    odd = dict.fromkeys(("csv_rows_without_name", "csv_rows_repeated", "ages_set_missing"), 0)
    columns = [*COLUMNS[:-1], *(name for name in EXTRA_COLUMNS if name in roles)]
    records: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = dict.fromkeys(columns, "") | {role: row[place].strip() for role, place in roles.items() if place < len(row)}
        image_id = _printable(re.split(r"[/\\]", cell["image_id"])[-1])
        if not image_id or image_id in records:
            odd["csv_rows_repeated" if image_id else "csv_rows_without_name"] += any(row)
            continue
        age, sex = cell["age"], cell["sex"].upper()
        records[image_id] = cell | {
            "image_id": image_id,
            "patient_id": _clean_patient(cell["patient_id"]) or _patient_of(image_id),
            "findings": _clean_findings(cell["findings"], unknown),
            "view_position": cell["view_position"].upper(),
            "age": _clean_age(age),
            "sex": {"MALE": "M", "FEMALE": "F"}.get(sex, sex),
        }
        odd["ages_set_missing"] += bool(age) and not records[image_id]["age"]
    return pd.DataFrame(list(records.values()), columns=columns, dtype=str), odd | {"unknown_findings": dict(unknown)}


def _clean_findings(text: str, unknown: Counter[str]) -> str:
    """NIH's spelling and the table's own order; names that are not NIH's are kept and counted."""
    names = []
    for name in filter(None, map(str.strip, text.split("|"))):
        known = _KNOWN.get(name.lower()) or _KNOWN.get(name.lower().replace(" ", "_"))
        if not known:
            unknown[name] += 1
        names.append(known or name)
    return "|".join(dict.fromkeys(names))


def _clean_patient(text: str) -> str:
    """``1``, ``00000001`` and ``1.0`` are one patient."""
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text, re.ASCII)
    return number[1] if number else text


def _patient_of(image_id: str) -> str:
    """Patient by NIH's naming ``<patient>_<number>.png``; any other image is taken to be its own patient."""
    nih = _NIH_NAME.fullmatch(image_id)
    return _clean_patient(nih[1]) if nih else image_id


def _clean_age(text: str) -> str:
    """Completed years; ``060Y``, ``007M``, ``010W``, ``012D`` is how DICOM writes ages. Empty if unreadable or over 120 (NIH has 414)."""
    age = re.fullmatch(r"(\d{1,4})(?:\.\d*)?\s*([YMWD]?)", text.upper(), re.ASCII)
    if not age:
        return ""
    years = int(age[1]) // {"M": 12, "W": 52, "D": 365}.get(age[2], 1)
    return str(years) if years <= 120 else ""


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers; everything else stays text, never NaN."""
    frame = frame.copy()
    for name in ("age", "angle"):
        if name in frame:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    if "mirrored" in frame:
        frame["mirrored"] = frame["mirrored"].str.lower().isin(["true", "1"])
    return frame


# ------------------------------------------------------------------------------------------------------------ preprocess


def preprocess(
    source_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    size: int = 64,
    resume: bool = True,
    split_seed: int = 0,
    test_share: float = 0.2,
    max_broken: float = 0.01,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from a folder of X-rays.

    Every readable PNG and JPEG below the folder becomes one row, in order of file name. Images are made 8-bit gray and averaged over the
    area of each new pixel: exact in integers, so the same bytes come out on every machine, with any number of workers, interrupted or
    not, and averaging commutes with quarter turns and mirrors (no other filter of Pillow's does at 1024 -> 64). Images that are not
    square are stretched, counted and warned of. Images without a row in the table are kept with empty findings and counted; rows
    without an image are only counted, since Kaggle's table always lists all 112,120.

    Work is saved every 256 images and goes on from there when called again. If all is done already for the same files and options, the
    manifest is returned at once.

    Parameters
    ----------
    source_dir : path
        What `fetch` filled, or any folder of images.
    out_dir : path
        Usually ``paths.dataset_dir(dataset)``.
    size : int
        Height and width of the images written.
    resume : bool
        False: do all the work again.
    split_seed : int
        Seed of the patient-wise split; not used where NIH's ``train_val_list.txt`` and ``test_list.txt`` are there.
    test_share : float
        Share of images in the test part, 0 <= test_share < 1; whole patients only, so it is met as nearly as they allow.
    max_broken : float
        Largest share of unreadable files that is only listed in the manifest.
    workers : int, optional
        Threads that decode (Pillow releases the interpreter lock); all cores if None.

    Returns
    -------
    dict
        The manifest: source, counts, sha256 of both files, what was dropped and why, attribution, versions.

    Raises
    ------
    ValueError
        No images, more than `max_broken` of them unreadable or none readable, a table without ``Finding Labels``, a bad option.
    OSError
        `out_dir` not writable or disk full; no file is left half-written.
    """
    if size < 1 or not 0 <= test_share < 1 or not 0 <= max_broken <= 1:
        raise ValueError(f"need size >= 1, 0 <= test_share < 1, 0 <= max_broken <= 1, not {size=}, {test_share=}, {max_broken=}")
    out_dir, source_dir = Path(out_dir), Path(source_dir)
    note = _read_source(source_dir) or {}
    folder = Path(note.get("path", source_dir))
    files = _walk(folder)
    images, repeated = _find_images(folder, files)
    table = _find_metadata(folder, files)
    lists = _read_lists(folder, files)
    kind = note.get("kind") or _kind(images)

    options = {"size": size, "split_seed": split_seed, "test_share": test_share, "max_broken": max_broken}
    identity = [_FORMAT, _CHUNK, options, kind, repeated, sorted(lists.items()), _sha256(table) if table else None]
    identity += [[file, *_stat(folder / file)] for file in images.values()]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if resume and (manifest := _finished(out_dir, fingerprint)):
        return manifest

    metadata, odd = _read_table(table) if table else (None, {})
    partial = out_dir / f".partial-{fingerprint[:16]}"
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    records = _decode_all(folder, list(images.values()), partial, size, max_broken, workers)
    kept = {image_id: record for image_id, record in zip(images, records, strict=True) if not record["reason"]}
    frame, matching = _join(list(kept), metadata)
    parts, split = _split(frame, lists, split_seed, test_share)
    frame.insert(COLUMNS.index("split"), "split", parts)
    with paths.atomic_write(partial / "images.npy") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "|u1", "fortran_order": False, "shape": (len(kept), size, size)})
        for chunk in sorted(partial.glob("[0-9]*.npy")):
            handle.write(np.load(chunk, allow_pickle=False).tobytes())
    with paths.atomic_write(partial / "metadata.csv", "w") as handle:
        frame.to_csv(handle, index=False, lineterminator="\n")

    dropped = {file: record["reason"] for file, record in zip(images.values(), records, strict=True) if record["reason"]}
    dropped |= dict.fromkeys(repeated, "another image has the same file name")
    manifest = {
        "format": _FORMAT,
        "source": {"kind": kind, "csv": table.name if table else None} | {key: note[key] for key in ("seed", "orientation") if key in note},
        "images": len(kept),
        "size": size,
        "patients": frame["patient_id"].nunique(),
        "split": split,
        "findings": dict(Counter("|".join(filter(None, frame["findings"])).split("|")).most_common()) if any(frame["findings"]) else {},
        "files": {name: {"bytes": _stat(partial / name)[0], "sha256": _sha256(partial / name)} for name in ("images.npy", "metadata.csv")},
        "dropped": [{"file": _printable(file), "reason": reason} for file, reason in dropped.items()],
        "image_modes": dict(Counter(record["mode"] for record in kept.values()).most_common()),
        "not_square_stretched": sum(record["width"] != record["height"] for record in kept.values()),
        "enlarged": sum(min(record["width"], record["height"]) < size for record in kept.values()),
        **matching,
        **odd,
        "attribution": _attribution(kind),
        "versions": {"python": platform.python_version(), "lib": __version__}
        | {package.__name__: package.__version__ for package in (np, pd, PIL)},
        "fingerprint": fingerprint,
    }
    paths.save_json(partial / "manifest.json", manifest)
    with _naming_disk_errors(out_dir):
        # The manifest vouches for the other two: an older one goes first, the new one comes last.
        (out_dir / "manifest.json").unlink(missing_ok=True)
        for name in ("images.npy", "metadata.csv", "manifest.json"):
            os.replace(partial / name, out_dir / name)
    for old in out_dir.glob(".partial-*"):
        shutil.rmtree(old, ignore_errors=True)
    if n := manifest["not_square_stretched"]:
        warnings.warn(f"{n} of {len(kept)} images are not square and were stretched to {size} x {size}", stacklevel=2)
    if repeated:
        warnings.warn(f"{len(repeated)} images were left out because another one has their file name; see manifest.json", stacklevel=2)
    return paths.load_json(out_dir / "manifest.json")


def _printable(text: str) -> str:
    """`text` with control characters and bytes that were no UTF-8 (lone surrogates to Python, which no CSV can hold) written as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _stat(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _finished(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest in `out_dir` if it is of this work and the files are as long as it says."""
    path = out_dir / "manifest.json"
    manifest = paths.load_json(path) if path.is_file() else {}
    whole = manifest.get("fingerprint") == fingerprint and all(_stat(out_dir / n)[0] == f["bytes"] for n, f in manifest["files"].items())
    return manifest if whole else None


def _decode_all(folder: Path, files: list[str], partial: Path, size: int, max_broken: float, workers: int | None) -> list[dict[str, Any]]:
    """Decode `files` into chunks in `partial` unless they are there: ``<k>.npy``, and ``<k>.json`` with a record of each file."""
    paths.save_json(partial / "plan.json", {"files": len(files)})  # an unwritable folder shows here, not after the work
    records: list[dict[str, Any]] = []
    broken: list[str] = []
    bar = tqdm(total=len(files), desc="preprocess", unit="image", mininterval=0.5)
    with bar, _strict_pillow(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            name = partial / f"{start // _CHUNK:06d}"
            done = _read_chunk(name, size)
            if len(done) != len(part):
                results = list(pool.map(lambda file: _decode(folder / file, size), part))
                done = [record for _, record in results]
                pixels = [image for image, record in results if not record["reason"]]
                paths.save_npy(name.with_suffix(".npy"), np.stack(pixels) if pixels else np.empty((0, size, size), np.uint8))
                paths.save_json(name.with_suffix(".json"), done)
            records += done
            broken += [f"{_printable(file)}: {record['reason']}" for file, record in zip(part, done, strict=True) if record["reason"]]
            bar.update(len(part))
            if len(broken) > max_broken * len(files) or len(broken) == len(files):
                shutil.rmtree(partial, ignore_errors=True)  # what is mended next may look the same from outside
                seen = f"{len(broken)} of the first {len(records)} of {len(files)} images in {folder}"
                raise ValueError(f"{seen} cannot be read ({'; '.join(broken[:3])}): replace or remove them, or raise {max_broken=}")
    return records


def _read_chunk(name: Path, size: int) -> list[dict[str, Any]]:
    """Records of a chunk that is whole, else none."""
    try:
        records = paths.load_json(name.with_suffix(".json"))
        pixels = np.load(name.with_suffix(".npy"), allow_pickle=False)
    except (OSError, ValueError):
        return []
    return records if pixels.shape == (sum(not record["reason"] for record in records), size, size) else []


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow's warnings become errors of the file at hand, and truncated files are refused whatever another library has set."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):  # the second has the decompression bombs
                warnings.filterwarnings("error", category=category, module=r"PIL\b")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decode(path: Path, size: int) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Pixels (size, size) uint8 and a record of the file; on any failure None and the reason in the record."""
    record: dict[str, Any] = {"reason": "", "mode": "", "width": 0, "height": 0}
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("not a regular file")
        if status.st_size > 8 * MAX_PIXELS:
            raise ValueError(f"file of {status.st_size} bytes is too large")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            record |= {"mode": image.mode, "width": image.width, "height": image.height}
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image.verify()  # the checksums of a PNG, which decoding alone does not look at
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            return _shrink(_to_gray(image), size), record
    except PIL.UnidentifiedImageError:
        record["reason"] = "empty file" if not content else "not a PNG or JPEG image"
    except Exception as error:  # damaged files raise nearly anything in a decoder, and one file must not stop the others
        text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        record["reason"] = text[:200]
    return None, record


def _to_gray(image: Image.Image) -> Image.Image:
    """Any PNG or JPEG as 8-bit gray (mode L), upright.

    16-bit gray is scaled from the bits it uses, as files from 12-bit detectors would otherwise be black: from 0..4095 if its maximum needs
    12 bits. Alpha that is the same everywhere (as in NIH's RGBA files) is dropped; other alpha is laid over black, the colour of air.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        full = 2 ** max(8, int(values.max()).bit_length()) - 1
        return Image.fromarray(((2 * 255 * values + full) // (2 * full)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low, high = image.getchannel("A").getextrema()
        if low != high:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK and palettes know no direct way to gray
    return image.convert("L")


def _shrink(image: Image.Image, size: int) -> np.ndarray:
    """Mean gray value over the area of each new pixel, rounded half up: (size, size) uint8."""
    width, height = image.size
    factors = width // size, height // size
    if (width, height) == (factors[0] * size, factors[1] * size) and math.prod(factors).bit_count() == 1:
        return np.asarray(image.reduce(factors))  # the same mean in a fraction of the time; exact for powers of two only
    # Sums of products of integers below 2^53: exact in float64 in whatever order a BLAS adds them.
    total = _overlap(height, size) @ np.asarray(image, np.float64) @ _overlap(width, size).T
    area = height * width
    return ((2 * total.astype(np.int64) + area) // (2 * area)).astype(np.uint8)


@lru_cache(maxsize=16)
def _overlap(length: int, size: int) -> np.ndarray:
    """Overlap of each of `size` new pixels with each of `length` old ones, in units of 1/size of an old one: (size, length)."""
    new, old = np.arange(size + 1)[:, None] * length, np.arange(length + 1)[None] * size
    return np.clip(np.minimum(new[1:], old[:, 1:]) - np.maximum(new[:-1], old[:, :-1]), 0, None).astype(np.float64)


def _join(image_ids: list[str], metadata: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[str, int]]:
    """One row an image, in order: its row of the table by file name, else by file name without extension, else what its name tells."""
    columns = list(COLUMNS[:-1]) if metadata is None else list(metadata.columns)
    rows = {} if metadata is None else {row[0]: row for row in metadata.itertuples(index=False, name=None)}
    stems: dict[str, tuple] = {}
    for name, row in rows.items():
        stems.setdefault(_IMAGE_SUFFIX.sub("", name), row)
    matched = [rows.get(image_id) or stems.get(_IMAGE_SUFFIX.sub("", image_id)) for image_id in image_ids]
    joined = [
        (image_id, *row[1:]) if row else (image_id, _patient_of(image_id), *[""] * (len(columns) - 2))
        for image_id, row in zip(image_ids, matched, strict=True)
    ]
    used = {row[0] for row in matched if row}
    counts = {"csv_rows": len(rows), "csv_rows_without_image": len(rows) - len(used), "images_without_csv_row": matched.count(None)}
    return pd.DataFrame(joined, columns=columns, dtype=str), counts


def _read_lists(folder: Path, files: list[str]) -> dict[str, str]:
    """NIH's own split, image_id -> train or test; empty unless both lists are there."""
    found = {PurePosixPath(file).name: folder / file for file in reversed(files) if PurePosixPath(file).name in _LIST_NAMES}
    if len(found) < len(_LIST_NAMES):
        return {}
    return {name: part for file, part in _LIST_NAMES.items() for name in found[file].read_text("utf-8", "replace").split()}


def _split(frame: pd.DataFrame, lists: dict[str, str], seed: int, test_share: float) -> tuple[list[str], dict[str, Any]]:
    """``train`` or ``test`` of each image, patient by patient, and a description.

    NIH's lists decide if they leave images on both sides; patients they do not name are drawn. The draw sorts patients by the SHA-256 of
    seed and name, which no version of a random generator can change, and takes as many as come nearest to `test_share` of the images.
    """
    ids, patients = frame["image_id"].tolist(), frame["patient_id"].tolist()
    listed = [lists.get(image_id) for image_id in ids]
    method = "NIH's lists"
    if set(listed) - {None} != {"train", "test"}:
        listed, method = [None] * len(ids), "drawn by patient"
    sides = {patient: part for patient, part in zip(patients, listed, strict=True) if part}
    both = {patient for patient, part in zip(patients, listed, strict=True) if part and part != sides[patient]}
    if both:
        warnings.warn(f"{len(both)} patients are on both sides of the lists ({min(both)}): probes will look too good", stacklevel=3)

    counts = Counter(patient for patient in patients if patient not in sides)
    order = sorted(counts, key=lambda patient: hashlib.sha256(f"{seed}/{patient}".encode()).digest())
    sums = np.cumsum([0, *(counts[patient] for patient in order)])
    n_test = int(np.argmin(np.abs(sums - test_share * sums[-1])))
    if test_share > 0 and len(order) > 1 and not sides:
        n_test = min(max(n_test, 1), len(order) - 1)  # nobody asked for an empty side
    sides |= {patient: "test" if place < n_test else "train" for place, patient in enumerate(order)}
    parts = [part or sides[patient] for part, patient in zip(listed, patients, strict=True)]
    n_listed = sum(part is not None for part in listed)
    return parts, {
        "method": method,
        "seed": seed,
        "test_share": test_share,
        "train": parts.count("train"),
        "test": parts.count("test"),
        "images_in_lists": n_listed,
        "patients_on_both_sides": len(both),
    }


# ------------------------------------------------------------------------------------------------------------------ load


def load_images(out_dir: str | os.PathLike, verify: bool = False) -> np.ndarray:
    """Open ``images.npy``, and no other file: training must not see labels.

    Parameters
    ----------
    out_dir : path
        Where `preprocess` wrote.
    verify : bool
        Compare the file's SHA-256 with the manifest (this opens ``manifest.json``).

    Returns
    -------
    memmap, shape (N, H, H), uint8, 0..255
        Read-only, in the order of ``metadata.csv``.

    Raises
    ------
    ValueError
        The file is missing, is no such array, or is not the one that the manifest vouches for.
    """
    path = _written(out_dir, "images.npy", verify)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{paths.show(path)} is not a .npy array ({error}): delete it and run 01_preprocess again") from error
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2] or not len(images):
        raise ValueError(f"{paths.show(path)} must be uint8 (N, 64, 64), not {images.dtype} {images.shape}: run 01_preprocess again")
    return images


def load(out_dir: str | os.PathLike, verify: bool = False) -> tuple[np.ndarray, pd.DataFrame]:
    """Open the images with what is known of them.

    Parameters
    ----------
    out_dir : path
        Where `preprocess` wrote.
    verify : bool
        Compare the SHA-256 of both files with the manifest.

    Returns
    -------
    images : memmap, shape (N, H, H), uint8
        See `load_images`.
    metadata : DataFrame, N rows
        image_id, patient_id, findings, view_position, sex, split: text, empty where unknown, never NaN. age: float64, years, NaN where
        unknown. For phantoms also side (text), angle (float64) and mirrored (bool).

    Raises
    ------
    ValueError
        A file is missing or not what `preprocess` wrote, or the two have different lengths.
    """
    images = load_images(out_dir, verify)
    path = _written(out_dir, "metadata.csv", verify)
    try:
        metadata = pd.read_csv(path, dtype=str, na_filter=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{paths.show(path)} is not a CSV ({error}): run 01_preprocess again") from error
    missing = [name for name in COLUMNS if name not in metadata]
    if missing or len(metadata) != len(images):
        fault = f"has no column {', '.join(missing)}" if missing else f"has {len(metadata)} rows for {len(images)} images"
        raise ValueError(f"{paths.show(path)} {fault}: run 01_preprocess again")
    return images, _typed(metadata)


def _written(out_dir: str | os.PathLike, name: str, verify: bool) -> Path:
    path = Path(out_dir) / name
    if not path.is_file():
        raise ValueError(f"there is no {paths.show(path)}: run 01_preprocess first")
    if verify:
        manifest = Path(out_dir) / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"there is no {paths.show(manifest)}, so preprocessing did not finish: run 01_preprocess again")
        if _sha256(path) != paths.load_json(manifest)["files"][name]["sha256"]:
            raise ValueError(f"{paths.show(path)} is not the file that the manifest was written for: run 01_preprocess again")
    return path


def finding_matrix(findings: Iterable[str]) -> np.ndarray:
    """Which of the 14 `FINDINGS` each image has.

    Parameters
    ----------
    findings : sequence of N str
        Findings joined by ``|``; "No Finding", unknown names and empty text set nothing.

    Returns
    -------
    ndarray, shape (N, 14), bool
    """
    place = {name: column for column, name in enumerate(FINDINGS)}
    texts = list(findings)
    matrix = np.zeros((len(texts), len(FINDINGS)), bool)
    for row, text in enumerate(texts):
        matrix[row, [place[name] for name in text.split("|") if name in place]] = True
    return matrix


def label_combinations(findings: Iterable[str]) -> np.ndarray:
    """Class of each image if every distinct findings text is a class of its own, as in the published evaluation.

    Parameters
    ----------
    findings : sequence of N str
        Findings joined by ``|``.

    Returns
    -------
    ndarray, shape (N,), int64
        0..C-1 in the alphabetical order of the texts; -1 for empty text, which is no label.
    """
    texts = list(findings)
    codes = {text: code for code, text in enumerate(sorted(set(texts) - {""}))} | {"": -1}
    return np.array([codes[text] for text in texts], dtype=np.int64)
