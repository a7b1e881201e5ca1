"""Where images come from. Kaggle's own client is pointed at a server on 127.0.0.1."""

import errno
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from lib import data, paths
from lib.data import chestmnist, digits, http, phantom, sources
from lib.data.http import DownloadError
from lib.data.preprocess import preprocess
from tests.server import SIGNATURE, Server, make_tar, packed, visible

SECRET = "KGAT_0123456789abcdefSECRET"
N_IMAGES = 6
HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position"
IMAGES = [f"{i // 2 + 1:08d}_{i % 2:03d}.png" for i in range(N_IMAGES)]
ROWS = [f"{name},Mass,0,{name[:8]},057Y,M,PA" for name in IMAGES]
TABLE = "\n".join([HEADER, *ROWS, ""]).encode()

pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


def png(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = {f"images_001/images/{name}": png(i) for i, name in enumerate(IMAGES)}
FULL = {"Data_Entry_2017.csv": TABLE, "BBox_List_2017.csv": b"Image Index\n"} | PNGS


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without any credential, and a clock that does not wait."""
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    for name in list(os.environ):
        if name.startswith("KAGGLE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr("time.sleep", lambda _: None)
    return home


@pytest.fixture
def kaggle(server, home, monkeypatch):
    """The real client, its table of addresses pointed at the server, and a token."""
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    for word, (name, _) in sources.KAGGLE.items():
        monkeypatch.setitem(sources.KAGGLE, word, (name, N_IMAGES))
    server.token = SECRET
    server.files["/nih-chest-xrays/data"] = packed(FULL)
    return server


def api_calls(server):
    return [headers for _, path, headers in server.log if path.endswith("DownloadDataset")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("kaggle", ("kaggle", None)),
        ("digits-turned", ("digits-turned", None)),
        ("chestmnist", ("chestmnist", None)),
        ("chestmnist:a.npz", ("chestmnist", Path("a.npz"))),
        ("a/b.NPZ", ("chestmnist", Path("a/b.NPZ"))),
        ("nih:/x", ("nih", Path("/x"))),
        ("nih:", ("folder", Path("nih:"))),
        ("./kaggle", ("folder", Path("kaggle"))),
        (Path("/x"), ("folder", Path("/x"))),
    ],
)
def test_words_and_paths(source, expected):
    assert sources.parse(source) == expected


# --------------------------------------------------------------------------------------------------


def test_phantoms_pass_through_the_reader_of_real_xrays(tmp_path):
    shown = sources.fetch("phantom", tmp_path / "raw", n_phantoms=12, seed=3)
    assert (shown["kind"], shown["images"]) == ("phantom", 12)
    assert str(tmp_path) not in json.dumps(shown)
    preprocess(tmp_path / "raw", tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    made, truth = phantom.make_phantoms(12, 3)
    truth = truth.sort_values("image_id")
    np.testing.assert_array_equal(images, made[truth.index])
    for name in ("image_id", "findings", "view_position", "sex", "side", "mirrored"):
        assert metadata[name].tolist() == truth[name].tolist()
    np.testing.assert_array_equal(metadata[["age", "angle"]], truth[["age", "angle"]])


def test_digits_pass_through_the_reader_of_real_xrays(tmp_path):
    shown = sources.fetch("digits-turned", tmp_path / "raw", seed=2)
    assert (shown["kind"], shown["images"]) == ("digits", 1797)
    preprocess(tmp_path / "raw", tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    made, truth = digits.make_digits(True, 2)
    np.testing.assert_array_equal(images, made)
    assert metadata["findings"].tolist() == truth["findings"].tolist()
    assert metadata["patient_id"].nunique() == 1797


def test_what_is_drawn_is_kept_until_something_else_is_asked_for(tmp_path, monkeypatch):
    raw, make = tmp_path / "raw", phantom.make_phantoms
    shown = sources.fetch("phantom", raw, n_phantoms=3, seed=0)
    monkeypatch.setattr(phantom, "make_phantoms", lambda *_: pytest.fail("drawn again"))
    assert sources.fetch("phantom", raw, n_phantoms=3, seed=0) == shown
    monkeypatch.setattr(phantom, "make_phantoms", make)
    for n, seed, orientation in ((5, 0, "upright"), (5, 1, "upright"), (5, 1, "any")):
        before = visible(raw)
        sources.fetch("phantom", raw, n_phantoms=n, seed=seed, orientation=orientation)
        assert len(list(raw.rglob("*.png"))) == n
        assert visible(raw) != before


def test_a_kill_while_phantoms_are_written_harms_nothing(tmp_path, monkeypatch):
    replace = os.replace
    for stop in range(3):
        calls = itertools.count()

        def dying(source, target, stop=stop, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt
            replace(source, target)

        sources.fetch("phantom", tmp_path / "raw", n_phantoms=3)
        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch("phantom", tmp_path / "raw", n_phantoms=4)
        monkeypatch.setattr(os, "replace", replace)
        sources.fetch("phantom", tmp_path / "raw", n_phantoms=4)
        assert len(list((tmp_path / "raw").rglob("*.png"))) == 4
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_drawn_images_do_not_replace_what_is_not_theirs(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="holds files"):
        sources.fetch("phantom", tmp_path / "raw")
    assert visible(tmp_path / "raw") == {"mine.png": png(0)}


# --------------------------------------------------------------------------------------------------


def make_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_stays_where_it_is(tmp_path):
    folder = make_folder(tmp_path / "xrays", FULL | {".hidden/x.png": b""})
    shown = sources.fetch(folder, tmp_path / "raw")
    assert (shown["kind"], shown["images"], shown["csv"]) == ("nih", 6, "Data_Entry_2017.csv")
    assert str(tmp_path) not in json.dumps(shown)
    assert not visible(tmp_path / "raw")
    assert preprocess(tmp_path / "raw", tmp_path / "out")["images"] == N_IMAGES
    shown = sources.fetch(make_folder(tmp_path / "own", {"a.jpg": b""}), tmp_path / "raw")
    assert (shown["kind"], shown["images"], shown["csv"]) == ("folder", 1, None)


def test_what_is_no_folder_of_images_is_named(tmp_path):
    make_folder(tmp_path, {"empty/notes.txt": b"", "a.zip": b""})
    for name in ("nowhere", "empty", "a.zip"):
        with pytest.raises(ValueError, match=name):
            sources.fetch(tmp_path / name, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


# --------------------------------------------------------------------------------------------------


def test_kaggle_brings_everything_and_leaves_no_archive(kaggle, tmp_path, capfd):
    raw, store = tmp_path / "raw" / "kaggle", tmp_path / "raw" / "nih-chest-xrays-data"
    shown = sources.fetch("kaggle", raw)
    assert visible(store) == FULL
    assert (shown["kind"], shown["images"], shown["csv"]) == ("nih", 6, "Data_Entry_2017.csv")
    assert preprocess(raw, tmp_path / "out")["patients"] == 3
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in api_calls(kaggle))
    gets = [headers for method, _, headers in kaggle.log if method == "GET"]
    assert not any("Authorization" in headers for headers in gets), "the storage got the token"
    text = "".join(capfd.readouterr())
    assert SECRET not in text
    assert SIGNATURE not in text
    kaggle.log.clear()
    assert sources.fetch("kaggle", tmp_path / "raw" / "kaggle-paper") == shown
    assert kaggle.log == [], "all presets use one download"


def test_kaggles_sample_is_a_zip_in_a_zip_and_has_doubles(kaggle, tmp_path):
    inner = {f"images/{name}": png(i) for i, name in enumerate(IMAGES)}
    inner |= {"sample_labels.csv": TABLE}
    inner |= {f"sample/{name}": content for name, content in inner.items()}
    kaggle.files["/nih-chest-xrays/sample"] = packed({"sample.zip": packed(inner)})
    shown = sources.fetch("kaggle-sample", tmp_path / "raw" / "x")
    assert (shown["images"], shown["csv"]) == (N_IMAGES, "sample_labels.csv")
    assert len(visible(tmp_path / "raw")) == N_IMAGES + 1
    kaggle.log.clear()
    sources.fetch("kaggle-sample", tmp_path / "raw" / "x")
    assert kaggle.log == []


def test_kaggle_goes_on_after_a_cut_an_expired_address_and_a_kill(kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "READ_AHEAD", 300)
    raw, store = tmp_path / "raw" / "kaggle", tmp_path / "raw" / "nih-chest-xrays-data"
    kaggle.faults = [None, None, None, None, 100, (403, {}), None, (503, {}), *[0] * 9]
    kaggle.refusals = [503]
    with pytest.raises(DownloadError, match="nih-chest-xrays/data from Kaggle: cut"):
        sources.fetch("kaggle", raw)
    assert len(api_calls(kaggle)) == 3
    there = visible(store)
    assert there.items() < FULL.items(), "nothing is half there"
    kaggle.faults = []
    sources.fetch("kaggle", raw)
    assert visible(store) == FULL
    (store / "images_001" / "images" / IMAGES[0]).unlink()  # what a user may do
    sources.fetch("kaggle", raw)
    assert visible(store) == FULL


def test_a_full_disk_keeps_what_came(kaggle, tmp_path, monkeypatch):
    def full(archive, info, staging, extract=zipfile.ZipFile.extract):
        if info.filename.endswith(IMAGES[2]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return extract(archive, info, staging)

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(OSError, match="CXR_DATA_DIR"):
        sources.fetch("kaggle", tmp_path / "raw" / "kaggle")
    assert 0 < len(visible(tmp_path / "raw")) < len(FULL)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_what_kaggle_refuses_is_one_line_without_the_token(status, kaggle, tmp_path, capfd):
    kaggle.refusals = [status] * 20
    with pytest.raises(DownloadError, match=f"nih-chest-xrays/data.*{status}") as caught:
        sources.fetch("kaggle", tmp_path / "raw" / "kaggle")
    text = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert SECRET not in text
    assert "\n" not in str(caught.value)
    assert not visible(tmp_path / "raw")


@pytest.mark.parametrize("way", ["variable", "access_token", "user and key"])
def test_every_way_to_give_a_credential(way, kaggle, home, tmp_path, monkeypatch, capfd):
    expected = f"Bearer {SECRET}"
    if way != "variable":
        monkeypatch.delenv("KAGGLE_API_TOKEN")
    if way == "access_token":
        (home / ".kaggle" / "access_token").write_text(SECRET + "\n")
    elif way == "user and key":
        monkeypatch.setenv("KAGGLE_USERNAME", "tester")
        monkeypatch.setenv("KAGGLE_KEY", SECRET)
        expected = requests.auth._basic_auth_str("tester", SECRET)
    monkeypatch.setenv("VERBOSE", "1")  # with which the client prints its headers
    assert sources.fetch("kaggle", tmp_path / "raw" / "kaggle")["images"] == N_IMAGES
    assert {headers["Authorization"] for headers in api_calls(kaggle)} == {expected}
    assert SECRET not in "".join(capfd.readouterr())


def test_a_token_that_is_not_taken(kaggle, tmp_path):
    kaggle.token = "another"
    with pytest.raises(DownloadError, match="KAGGLE_API_TOKEN") as caught:
        sources.fetch("kaggle", tmp_path / "raw" / "kaggle")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_without_credentials_the_steps_are_given(home, tmp_path):
    """A process of its own: the client looks for credentials when it is imported."""
    code = "from lib.data import sources; sources.fetch('kaggle', 'raw/kaggle')"
    kept = {name: value for name, value in os.environ.items() if "KAGGLE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=kept | {"PYTHONPATH": str(paths.ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "DownloadError" in last
    assert all(word in last for word in ("kaggle.com/settings", "KAGGLE_API_TOKEN", "chestmnist"))
    assert done.stdout == ""
    assert "SystemExit" not in done.stderr


# --------------------------------------------------------------------------------------------------


def test_chestmnist_is_downloaded_once_and_checked(server, home, tmp_path, monkeypatch):
    from tests.test_chestmnist import medmnist

    medmnist(tmp_path / "published.npz")
    content = (tmp_path / "published.npz").read_bytes()
    server.files["/file.npz"] = content
    monkeypatch.setattr(chestmnist, "URL", f"{server.url}/file.npz?download=1")
    monkeypatch.setattr(chestmnist, "MD5", hashlib.md5(content).hexdigest())
    server.faults = [None, 5000]
    shown = sources.fetch("chestmnist", tmp_path / "raw" / "chestmnist")
    assert (shown["kind"], shown["images"], shown["csv"]) == ("chestmnist", 12, None)
    assert "zenodo" in shown["origin"]
    assert "MD5" in shown["verified"]
    server.log.clear()
    assert sources.fetch("chestmnist", tmp_path / "raw" / "chestmnist-paper") == shown
    assert server.log == []
    monkeypatch.setattr(chestmnist, "MD5", "0")
    shown = sources.fetch(f"chestmnist:{tmp_path / 'published.npz'}", tmp_path / "raw" / "mine")
    assert "not the published file" in shown["origin"]


# --------------------------------------------------------------------------------------------------


def nih_box(folder, n=12):
    """What NIH hands out: archives with one folder `images`, and the tables beside them."""
    folder.mkdir()
    for k in range(n):
        path = folder / f"images_{k + 1:03d}.tar.gz"
        make_tar(path, {f"images/{k + 1:08d}_000.png": png(k)})
    rows = [f"{k + 1:08d}_000.png,Mass,0,{k + 1},057Y,M,PA" for k in range(n)]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *rows, ""]))
    (folder / "test_list.txt").write_text("00000001_000.png\n")
    (folder / "README.pdf").write_bytes(b"x")
    return folder


def test_nih_archives_are_unpacked_once_beside_their_table(tmp_path):
    box = nih_box(tmp_path / "box")
    before = visible(box)
    shown = sources.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    assert (shown["images"], shown["csv"]) == (12, "Data_Entry_2017_v2020.csv")
    (store,) = (tmp_path / "raw").glob("nih-*")
    files = visible(store)
    assert files["images_012/images/00000012_000.png"] == png(11)
    assert len(files) == 14, "images, table and list"
    assert visible(box) == before, "the folder is the user's"
    changed = (store / "images_001").stat().st_mtime_ns
    assert sources.fetch(f"nih:{box}", tmp_path / "raw" / "box-paper") == shown
    assert (store / "images_001").stat().st_mtime_ns == changed, "unpacked twice"


def test_nih_files_that_are_unpacked_are_used_where_they_lie(tmp_path):
    box = nih_box(tmp_path / "box", 2)
    for path in box.glob("*.tar.gz"):
        http.untar(path, box)
    assert sources.fetch(f"nih:{box}", tmp_path / "raw" / "box")["images"] == 2
    assert not visible(tmp_path / "raw")


def test_a_nih_folder_that_lacks_something_is_named(tmp_path):
    box = nih_box(tmp_path / "box", 3)
    with pytest.warns(UserWarning, match="3 of NIH's 12 archives"):
        assert sources.fetch(f"nih:{box}", tmp_path / "raw" / "box")["images"] == 3
    archive = box / "images_002.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(DownloadError, match=archive.name):
        sources.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    for path in box.glob("*.tar.gz"):
        path.unlink()
    with pytest.raises(ValueError, match="neither images nor"):
        sources.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    next(box.glob("*.csv")).unlink()
    with pytest.raises(ValueError, match="no Data_Entry_2017"):
        sources.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    with pytest.raises(ValueError, match="not a folder"):
        sources.fetch(f"nih:{box / 'README.pdf'}", tmp_path / "raw" / "box")
