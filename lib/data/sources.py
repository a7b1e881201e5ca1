"""Where images come from: drawn here, from Kaggle, Zenodo, NIH's archives, or a folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import requests
from PIL import Image

from lib import paths
from lib.data import chestmnist, digits, http, nih, phantom, tables
from lib.data.http import DownloadError

WORDS = ("phantom", "digits", "digits-turned", "chestmnist", "kaggle", "kaggle-sample")
KAGGLE = {  # name on Kaggle, and images in it
    "kaggle": ("nih-chest-xrays/data", 112_120),
    "kaggle-sample": ("nih-chest-xrays/sample", 5_606),
}
NO_CREDENTIALS = (
    "Kaggle needs credentials, and there are none that it takes: (1) sign in at "
    "https://www.kaggle.com, an account is free; (2) make a token at "
    "https://www.kaggle.com/settings/api, 'Generate New Token'; (3) put it into the environment "
    "variable KAGGLE_API_TOKEN or into the file ~/.kaggle/access_token (kaggle.json does as well), "
    "and give the same command again. Without an account: --data chestmnist (the same X-rays at "
    "64x64) or --data phantom (drawn ones)"
)
ATTRIBUTIONS = {
    "phantom": phantom.ATTRIBUTION,
    "digits": digits.ATTRIBUTION,
    "chestmnist": chestmnist.ATTRIBUTION,
    "nih": nih.ATTRIBUTION,
    "folder": "Images of the user's own folder, under their own terms. Not for clinical use.",
}
_KAGGLES = {  # Kaggle's headers of what is drawn here
    "image_id": "Image Index",
    "findings": "Finding Labels",
    "patient_id": "Patient ID",
    "age": "Patient Age",
    "sex": "Patient Gender",
    "view_position": "View Position",
}
_BESIDE = (*nih.METADATA_NAMES, *nih.LIST_NAMES, "BBox_List_2017.csv")
_TAR = re.compile(r"(images_\d{2,3})\.(tar\.gz|tgz)", re.IGNORECASE)
_BARE = re.compile(r"(^|/)[^./]+$|\.\d+$")  # perhaps a DICOM
_UNREAD = "nothing yet: 01_preprocess reads image by image"
_DONE = ".done.json"  # in a folder that was filled to the end


def parse(source: str | os.PathLike) -> tuple[str, Path | None]:
    """Split a source into a word and a path.

    ``"kaggle"`` gives ``("kaggle", None)``, ``"nih:PATH"`` gives ``("nih", PATH)``,
    ``"chestmnist:FILE"`` and any ``FILE.npz`` give ``("chestmnist", FILE)``, and another path gives
    ``("folder", PATH)``.
    """
    text = os.fspath(source)
    if text in WORDS:
        return text, None
    word, _, place = text.partition(":")
    if word in ("nih", "chestmnist") and place:
        return word, Path(place).expanduser()
    return ("chestmnist" if text.lower().endswith(".npz") else "folder"), Path(text).expanduser()


def fetch(
    source: str | os.PathLike,
    raw_dir: str | os.PathLike,
    n_phantoms: int = 256,
    seed: int = 0,
    csv: str | os.PathLike | None = None,
    *,
    orientation: str = "upright",
) -> dict[str, Any]:
    """Put a source of images into place for `preprocess`. What is here already is not fetched.

    Parameters
    ----------
    source : str or path
        ``"phantom"``, ``"digits"`` and ``"digits-turned"`` are drawn, in Kaggle's layout, so that
        they pass through the reader of real X-rays. ``"kaggle"`` and ``"kaggle-sample"`` come from
        Kaggle, ``"chestmnist"`` from Zenodo; ``"chestmnist:FILE.npz"`` is a file that is here.
        ``"nih:PATH"`` is a folder with NIH's ``images_001.tar.gz`` and so on, or with what was
        unpacked from them. Anything else is a folder with images, which stays where it is.
    raw_dir : path
        Folder of this source, usually ``paths.raw_dir(dataset)``. Downloads go beside it, under a
        name of their own, so that every preset uses the same.
    n_phantoms, seed : int
        Number of phantoms; seed of phantoms and of the digits' angles.
    csv : path, optional
        Table of a folder, if it is not the only one.
    orientation : {"upright", "any"}
        How phantoms and digits hang. ``"digits-turned"`` is ``"digits"`` with ``"any"``.

    Returns
    -------
    dict
        For display: kind, images, csv, folder, attribution, origin, verified; no path of this
        machine.

    Raises
    ------
    DownloadError
        No credentials, space, connection or permission, or a damaged archive.
    ValueError
        `source` is not what it promises, or `raw_dir` holds something that is not ours to replace.
    OSError
        A folder cannot be written or the disk is full; what has arrived is kept.
    """
    raw_dir = Path(raw_dir)
    word, path = parse(source)
    if word in ("phantom", "digits", "digits-turned"):
        kind, turned = word.split("-")[0], word == "digits-turned" or orientation == "any"
        note = _drawn(kind, raw_dir, int(n_phantoms), int(seed), "any" if turned else "upright")
        return _shown(note, raw_dir)
    if word in KAGGLE:
        store = raw_dir.with_name(KAGGLE[word][0].replace("/", "-"))
        note = _from_kaggle(*KAGGLE[word], store)
    elif word == "chestmnist":
        note = _from_chestmnist(path, raw_dir.with_name("medmnist") / chestmnist.NAME)
    elif word == "nih":
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
        note = _from_nih(path.resolve(), raw_dir.with_name(f"nih-{name}"))
    else:
        if not path.is_dir():
            what = "is a file, not a folder: unpack it" if path.exists() else "is not there"
            raise ValueError(f"{path} {what}; give the path of a folder with X-rays")
        note = _note(path, "your own folder", csv=csv)
        if not note["images"]:
            raise ValueError(f"no images in {path}: give a folder with X-rays, or --data phantom")
    paths.save_json(raw_dir / "source.json", note)
    return _shown(note, Path(note["path"]))


def read_source(raw_dir: Path) -> dict[str, Any] | None:
    """The note that `fetch` left in a folder, if there is one."""
    note = raw_dir / "source.json"
    content = paths.load_json(note) if note.is_file() else None
    known = isinstance(content, dict) and content.get("kind") in ATTRIBUTIONS
    return content if known else None


def _shown(note: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A note as a notebook may show it."""
    shown = {key: note.get(key) for key in ("kind", "images", "csv", "origin", "verified")}
    return shown | {"folder": paths.show(folder), "attribution": ATTRIBUTIONS[note["kind"]]}


# --------------------------------------------------------------------------------------------------


def _drawn(kind: str, raw_dir: Path, n: int, seed: int, orientation: str) -> dict[str, Any]:
    """Phantoms or digits in `raw_dir`, drawn anew if something else is there."""
    module = {"phantom": phantom, "digits": digits}[kind]
    # The generator is part of the identity: what an older version has drawn is drawn again.
    note = {
        "kind": kind,
        "origin": "drawn here",
        "verified": _UNREAD,
        "images": n if kind == "phantom" else digits.IMAGES,
        "csv": nih.METADATA_NAMES[0],
        "seed": seed,
        "generator": hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest(),
    }
    note |= {} if orientation == "upright" else {"orientation": orientation}
    if read_source(raw_dir) == note:
        return note
    with paths.alone(raw_dir, raw_dir.with_name(f".{raw_dir.name}.lock")):
        there = (read_source(raw_dir) or {}).get("kind")
        files = {path.name for path in raw_dir.iterdir()} if raw_dir.exists() else set()
        if there not in ("phantom", "digits") and files - {"source.json"}:
            raise ValueError(
                f"{paths.show(raw_dir)} holds files that were not drawn here: move them away, or "
                "choose another dataset name"
            )
        if kind == "phantom":
            images, table = phantom.make_phantoms(n, seed, orientation)
        else:
            images, table = digits.make_digits(orientation == "any", seed)
        _write_drawn(raw_dir, note, images, table)
    return note


def _write_drawn(raw_dir: Path, note: dict[str, Any], images: Any, table: pd.DataFrame) -> None:
    """Write images and table in Kaggle's layout, beside their place, and move them there whole."""
    building, old = (raw_dir.with_name(f".{raw_dir.name}.{end}") for end in ("partial", "old"))
    with http.naming_disk_errors(raw_dir):
        for leftover in (building, old):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for place, (image_id, image) in enumerate(zip(table["image_id"], images, strict=True)):
            folder = building / f"images_{place // 10_000 + 1:03d}" / "images"  # as on Kaggle
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / image_id)
        with open(building / note["csv"], "w", encoding="utf-8", newline="\n") as handle:
            table.rename(columns=_KAGGLES).to_csv(handle, index=False, lineterminator="\n")
        paths.save_json(building / "source.json", note)
        if raw_dir.exists():
            os.replace(raw_dir, old)
        os.replace(building, raw_dir)
        shutil.rmtree(old, ignore_errors=True)


def list_files(folder: Path) -> list[str]:
    """Relative paths (``/``) of all files in `folder`, sorted, without hidden ones."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        prefix = Path(base).relative_to(folder)
        found += [(prefix / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _note(folder: Path, origin: str, verified: str = _UNREAD, csv: Any = None) -> dict[str, Any]:
    """A note of a folder with images. It is NIH's if most of its images are named as NIH's are."""
    files = list_files(folder)
    images = [file for file in files if tables.IMAGE_SUFFIX.search(file)]
    images = images or [file for file in files if _BARE.search(file)]
    named = sum(nih.NIH_NAME.fullmatch(file.rpartition("/")[2]) is not None for file in images)
    with warnings.catch_warnings(action="ignore"):  # 01_preprocess says which tables it cannot use
        table = Path(csv) if csv else tables.find_metadata(folder, files)
    return {
        "kind": "nih" if 2 * named > len(images) else "folder",
        "path": str(folder.resolve()),
        "images": len(images),
        "csv": table.name if table else None,
        "origin": origin,
        "verified": verified,
    }


# --------------------------------------------------------------------------------------------------


def _from_kaggle(name: str, expected: int, store: Path) -> dict[str, Any]:
    """A Kaggle data set. Its zip is unpacked while it is read and never lies on the disk."""
    done = paths.load_json(store / _DONE) if (store / _DONE).is_file() else {"files": 0}
    origin = f"{name} from Kaggle"
    note = _note(store, origin)
    if not done["files"] or note["images"] < done["images"]:
        with paths.alone(store):
            remote = http.RemoteFile(lambda: _kaggle_address(name), origin)
            with io.BufferedReader(remote, http.READ_AHEAD) as opened:
                files = http.unzip(opened, store, name)
            zips = sorted(store.rglob("*.zip"))  # the sample was published as a zip in a zip
            for file in zips:
                with open(file, "rb") as opened:
                    files += http.unzip(opened, file.parent, file.name)
            note = _note(store, origin)
            done = {"files": files, "images": note["images"]}
            paths.save_json(store / _DONE, done)
            for file in zips:
                file.unlink()
    if note["images"] != expected:
        warnings.warn(f"{name} has {note['images']:,} images and not {expected:,}", stacklevel=3)
    return note | {"verified": f"length and CRC-32 of each of {done['files']:,} files"}


def _kaggle_address(name: str) -> str:
    """The signed address of a data set's zip, to which Kaggle's API redirects.

    The package ``kaggle`` finds the credentials. It is imported here and not above, since on import
    it looks for them and asks the network. If there are none, it prints a help and calls ``exit``,
    which is a NameError in a Jupyter kernel. Its errors may hold a credential: none is chained.
    """
    hint = (
        f"open https://www.kaggle.com/datasets/{name} while signed in and accept what it asks for, "
        "or make a new token at https://www.kaggle.com/settings/api"
    )
    unseen = io.StringIO()
    try:
        with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            from kaggle.api.kaggle_api_extended import KaggleApi
            from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

            api = KaggleApi()
            api.authenticate()
            question = ApiDownloadDatasetRequest()
            question.owner_slug, question.dataset_slug = name.split("/")
            with api.build_kaggle_client() as client:
                http.patient(client.http_client()._session)
                answer = client.datasets.dataset_api_client.download_dataset(question)
                answer.close()  # its body is asked for in parts
                return answer.url
    except (SystemExit, NameError):
        fault = NO_CREDENTIALS
    except requests.HTTPError as error:
        fault = f"Kaggle refuses {name} ({error.response.status_code}): {hint}"
    except Exception as error:
        fault = f"Kaggle's client failed ({type(error).__name__}): try again later, or {hint}"
    raise DownloadError(fault)


def _from_chestmnist(given: Path | None, path: Path) -> dict[str, Any]:
    """ChestMNIST's file, `given` or downloaded to `path`."""
    if given is None and not path.is_file():
        with paths.alone(path.parent):
            http.download(chestmnist.URL, path, chestmnist.MD5)
    path = given or path
    facts = chestmnist.check(path)
    note = {"kind": "chestmnist", "path": str(path.resolve()), "images": facts["images"]}
    origin = f"{chestmnist.PAGE}" if facts["published"] else f"{path.name}, not the published file"
    verified = "MD5 as published, " if facts["published"] else ""
    return note | {"csv": None, "origin": origin, "verified": f"{verified}shape of the arrays"}


def _from_nih(folder: Path, store: Path) -> dict[str, Any]:
    """NIH's own files: used where they lie if they are unpacked, else unpacked into `store`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the one with images_001.tar.gz")
    note = _note(folder, "NIH's own files")
    if not note["csv"]:
        raise ValueError(
            f"there is no Data_Entry_2017*.csv in {folder}: download it from "
            "https://nihcc.app.box.com/v/ChestXray-NIHCC and put it beside the archives"
        )
    if note["kind"] == "nih":
        return note
    files = [folder / file for file in list_files(folder)]
    tars = {name[1].lower(): file for file in files if (name := _TAR.fullmatch(file.name))}
    if not tars:
        raise ValueError(f"{folder} holds neither images nor images_001.tar.gz and so on")
    with paths.alone(store):
        done = paths.load_json(store / _DONE) if (store / _DONE).is_file() else {}
        states = {name: [file.stat().st_size, file.stat().st_mtime] for name, file in tars.items()}
        todo = [name for name in tars if done.get(name) != states[name]]
        need = sum(states[name][0] for name in todo)  # PNGs unpack to what they were packed to
        http.need_space(store, need + need // 20, f"unpacking {len(todo)} archives")
        for name in todo:
            http.untar(tars[name], store / name)
            done[name] = states[name]
            paths.save_json(store / _DONE, done)
        for file in files:
            if file.name in _BESIDE:
                shutil.copyfile(file, store / file.name)
    if len(tars) != 12:
        warnings.warn(f"{len(tars)} of NIH's 12 archives are in {paths.show(folder)}", stacklevel=3)
    return _note(store, note["origin"], f"the checksum of each of {len(tars)} archives")
