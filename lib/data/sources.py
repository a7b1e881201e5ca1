"""Where images come from: drawn here, from Kaggle, Zenodo, NIH's archives, or a folder."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import requests
from PIL import Image

from lib import paths
from lib.data import chestmnist, decode, digits, http, nih, phantom, sha256, tables
from lib.data.http import DownloadError

WORDS = ("phantom", "digits", "digits-turned", "chestmnist", "kaggle", "kaggle-sample")
KAGGLE = {"kaggle": ("nih-chest-xrays/data", 112_120)}  # name on Kaggle, and images in it
KAGGLE["kaggle-sample"] = ("nih-chest-xrays/sample", 5_606)
NO_CREDENTIALS = (
    "Kaggle needs credentials, and there are none that it takes: (1) sign in at "
    "https://www.kaggle.com, an account is free; (2) make a token at "
    "https://www.kaggle.com/settings/api; (3) put it into the environment variable "
    "KAGGLE_API_TOKEN or the file ~/.kaggle/access_token, and give the same command again. "
    "Without an account: --data chestmnist (the same X-rays at 64x64) or --data phantom"
)
ATTRIBUTIONS = {"phantom": phantom.ATTRIBUTION, "digits": digits.ATTRIBUTION}
ATTRIBUTIONS |= {"chestmnist": chestmnist.ATTRIBUTION, "nih": nih.ATTRIBUTION}
TERMS = "Images of the user's own folder, under their own terms. Not for clinical use."
ATTRIBUTIONS |= {"folder": TERMS}
_HEADERS = {  # Kaggle's, for what is drawn here
    "image_id": "Image Index", "findings": "Finding Labels", "patient_id": "Patient ID",
    "age": "Patient Age", "sex": "Patient Gender", "view_position": "View Position",
}  # fmt: skip
_TAR = re.compile(r"(images_\d{2,3})\.(tar\.gz|tgz)", re.IGNORECASE)
_UNREAD = "nothing yet: 01_preprocess reads image by image"
_DONE = ".done.json"  # in a folder that was filled to the end


def parse(source: str | os.PathLike) -> tuple[str, Path | None]:
    """Split a source into a word (of `WORDS`, ``nih``, ``chestmnist``, ``folder``) and a path."""
    text = os.fspath(source)
    if text in WORDS:
        return text, None
    word, _, place = text.partition(":")
    if word not in ("nih", "chestmnist") or not place:
        word, place = "chestmnist" if text.lower().endswith(".npz") else "folder", text
    return word, Path(place).expanduser()


def fetch(source, raw_dir, n_phantoms: int = 256, seed: int = 0, csv=None) -> dict:
    """Put a source of images into place for `preprocess`. What is here already is not fetched.

    `source` is a word of `WORDS`, ``"chestmnist:FILE.npz"``, ``"nih:PATH"`` of a folder with NIH's
    archives or with what was unpacked from them, or a folder with images, which stays where it is.
    `raw_dir` is usually ``paths.raw_dir(dataset)``; downloads go beside it, every preset uses the
    same. `seed` is of phantoms and of the digits' angles. `csv` is the table of a folder, if it is
    not the only one. Returns a dict for display: kind, images, csv, folder, attribution, origin,
    verified.

    Raises DownloadError without credentials, space, connection or permission, or if an archive is
    damaged; ValueError if `source` is not what it promises, or `raw_dir` holds what was not drawn
    here; OSError if the disk refuses. What has arrived is kept."""
    raw_dir, (word, path) = Path(raw_dir), parse(source)
    if word in ("phantom", "digits", "digits-turned"):
        note = _drawn(word, raw_dir, int(n_phantoms), int(seed))
    elif word in KAGGLE:
        note = _from_kaggle(*KAGGLE[word], raw_dir.with_name(KAGGLE[word][0].replace("/", "-")))
    elif word == "chestmnist":
        note = _from_chestmnist(path, raw_dir.with_name("medmnist") / chestmnist.NAME)
    elif word == "nih":
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
        note = _from_nih(path.resolve(), raw_dir.with_name(f"nih-{name}"))
    else:
        note = _note(path, "your own folder", csv=csv, needed=True)
    if "path" in note:
        paths.save_json(raw_dir / "source.json", note)
    shown = {key: note.get(key) for key in ("kind", "images", "csv", "origin", "verified")}
    folder = paths.show(note.get("path", raw_dir))
    return shown | {"folder": folder, "attribution": ATTRIBUTIONS[note["kind"]]}


def read_source(raw_dir: Path) -> dict:
    """The note that `fetch` left in a folder; empty if there is none."""
    note = _json(raw_dir / "source.json")
    return note if isinstance(note, dict) and note.get("kind") in ATTRIBUTIONS else {}


def _json(path: Path) -> dict:
    return paths.load_json(path) if path.is_file() else {}


def find_images(folder: Path, needed: bool = True) -> tuple[list[str], list[str]]:
    """Relative paths (``/``) of the images in a folder and of its other files, without hidden ones.
    ValueError if it is no folder, or if there are no images and they are `needed`."""
    if not folder.is_dir():
        what = "is a file, not a folder: unpack it" if folder.exists() else "is not there"
        raise ValueError(f"{folder} {what}; give a folder with X-rays, or --data phantom")
    images, others = [], []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            is_image = tables.IMAGE_SUFFIX.search(path.name)
            if "." not in path.name or path.suffix[1:].isdecimal():  # perhaps a DICOM
                is_image = path.name != "DICOMDIR" and decode.is_dicom(path)
            (images if is_image else others).append(path.relative_to(folder).as_posix())
    if needed and not images:
        found = Counter(Path(other).suffix.lower() or "no extension" for other in others)
        held = ", ".join(f"{n} {tables.printable(end)}" for end, n in found.most_common(4))
        text = f"it holds {held or 'no file'}; give a folder with X-rays"
        raise ValueError(f"no images in {folder}: {text}")
    return sorted(images), sorted(others)


def kind_of(images: Collection[str]) -> str:
    """``"nih"`` if most images are named as NIH's are, else ``"folder"``."""
    named = sum(nih.NIH_NAME.fullmatch(image.rpartition("/")[2]) is not None for image in images)
    return "nih" if 2 * named > len(images) else "folder"


def _note(folder: Path, origin: str, verified=_UNREAD, csv=None, needed=False) -> dict:
    """A note of a folder with images."""
    images, others = find_images(folder, needed)
    with warnings.catch_warnings(action="ignore"):  # 01_preprocess says which tables it cannot use
        table = tables.find_metadata(folder, others, given=csv)
    note = {"kind": kind_of(images), "path": str(folder.resolve()), "images": len(images)}
    return note | {"csv": table and table.name, "origin": origin, "verified": verified}


def _drawn(word: str, raw_dir: Path, n: int, seed: int) -> dict:
    """Phantoms or digits in Kaggle's layout, drawn anew beside `raw_dir` if it holds others."""
    kind, module = ("phantom", phantom) if word == "phantom" else ("digits", digits)
    # The generator is part of the identity: what an older version has drawn is drawn again.
    note = {"kind": kind, "origin": "drawn here", "verified": _UNREAD, "seed": seed}
    note |= {"images": n if kind == "phantom" else digits.IMAGES, "csv": nih.METADATA_NAMES[0]}
    note["generator"] = sha256(Path(module.__file__))
    note |= {"orientation": "any"} if word == "digits-turned" else {}
    if read_source(raw_dir) == note:
        return note
    new, old, lock = (raw_dir.with_name(f".{raw_dir.name}.{end}") for end in ("new", "old", "lock"))
    with paths.alone(raw_dir, lock), http.naming_disk_errors(raw_dir):
        files = {path.name for path in raw_dir.iterdir()} if raw_dir.exists() else set()
        there = read_source(raw_dir).get("kind")
        if there not in ("phantom", "digits") and files - {"source.json"}:
            holds = f"{paths.show(raw_dir)} holds files that were not drawn here"
            raise ValueError(f"{holds}: move them away, or choose another dataset name")
        make = phantom.make_phantoms if kind == "phantom" else digits.make_digits
        images, table = make(n if kind == "phantom" else word == "digits-turned", seed)
        for leftover in (new, old):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for place, (image_id, image) in enumerate(zip(table["image_id"], images, strict=True)):
            folder = new / f"images_{place // 10_000 + 1:03d}" / "images"  # as on Kaggle
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / image_id)
        with open(new / note["csv"], "w", encoding="utf-8", newline="\n") as handle:
            table.rename(columns=_HEADERS).to_csv(handle, index=False, lineterminator="\n")
        paths.save_json(new / "source.json", note)
        if raw_dir.exists():
            os.replace(raw_dir, old)
        os.replace(new, raw_dir)
        shutil.rmtree(old, ignore_errors=True)
    return note


def _from_kaggle(name: str, expected: int, store: Path) -> dict:
    """A Kaggle data set. Its zip is unpacked while it is read and never lies on the disk."""
    origin = f"{name} from Kaggle"
    done = _json(store / _DONE)
    note = _note(store, origin) if done else {}
    if not done or note["images"] < done["images"]:
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

    The package ``kaggle`` is imported here, since on import it looks for credentials and asks the
    network. If there are none, it prints a help and calls ``exit``, which is a NameError in a
    Jupyter kernel. Its errors may hold a credential: none is chained."""
    page = f"https://www.kaggle.com/datasets/{name} while signed in and accept what it asks for"
    hint = f"open {page}, or make a new token at https://www.kaggle.com/settings/api"
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


def _from_chestmnist(given: Path | None, path: Path) -> dict:
    """ChestMNIST's file, `given` or downloaded to `path`."""
    if given is None and not path.is_file():
        with paths.alone(path.parent):
            http.download(chestmnist.URL, path, chestmnist.MD5)
    path = given or path
    facts = chestmnist.check(path)
    origin, verified = chestmnist.PAGE, "MD5 as published, all arrays"
    if not facts["published"]:
        origin, verified = f"{path.name}, not the published file", "all arrays"
    note = {"kind": "chestmnist", "path": str(path.resolve()), "images": facts["images"]}
    return note | {"csv": None, "origin": origin, "verified": verified}


def _from_nih(folder: Path, store: Path) -> dict:
    """NIH's own files: used where they lie if they are unpacked, else unpacked into `store`."""
    note = _note(folder, "NIH's own files")
    if not note["csv"]:
        hint = "from https://nihcc.app.box.com/v/ChestXray-NIHCC and put it beside the archives"
        raise ValueError(f"there is no Data_Entry_2017*.csv in {folder}: download it {hint}")
    if note["kind"] == "nih":
        return note
    files = [folder / file for file in find_images(folder, needed=False)[1]]
    tars = {name[1].lower(): file for file in files if (name := _TAR.fullmatch(file.name))}
    if not tars:
        raise ValueError(f"{folder} holds neither images nor images_001.tar.gz and so on")
    with paths.alone(store):
        done = _json(store / _DONE)
        states = {name: [file.stat().st_size, file.stat().st_mtime] for name, file in tars.items()}
        todo = [name for name in tars if done.get(name) != states[name]]
        need = sum(states[name][0] for name in todo)  # PNGs unpack to what they were packed to
        http.need_space(store, need + need // 20, f"unpacking {len(todo)} archives")
        for name in todo:
            http.untar(tars[name], store / name)
            done[name] = states[name]
            paths.save_json(store / _DONE, done)
        for file in files:
            if file.suffix in (".csv", ".txt"):
                shutil.copyfile(file, store / file.name)
    if len(tars) != 12:
        warnings.warn(f"{len(tars)} of NIH's 12 archives are in {paths.show(folder)}", stacklevel=3)
    return _note(store, note["origin"], f"the checksum of each of {len(tars)} archives")
