"""Where images come from. Kaggle's own client is pointed at a server on 127.0.0.1."""

import hashlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import data, paths
from lib.data import chestmnist, digits, http, phantom, sources
from lib.data.http import DownloadError
from lib.data.preprocess import preprocess
from tests.server import SIGNATURE, cuts, make_folder, make_tar, packed, visible
from tests.test_chestmnist import medmnist
from tests.xrays import HEADER, png

SECRET = "KGAT_0123456789abcdefSECRET"
IMAGES = [f"{i // 2 + 1:08d}_{i % 2:03d}.png" for i in range(6)]
pytestmark = cuts


def image(seed):
    return png(np.random.default_rng(seed).integers(0, 256, (8, 8)), 8)


def table(names):
    rows = [f"{name},Mass,0,{name[:8]},057Y,M,PA\n" for name in names]
    return (HEADER + "".join(rows)).encode()


PNGS = {f"images_001/images/{name}": image(i) for i, name in enumerate(IMAGES)}
FULL = {"Data_Entry_2017.csv": table(IMAGES), "BBox_List_2017.csv": b"Image Index\n"} | PNGS


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw" / "dataset"


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
        monkeypatch.setitem(sources.KAGGLE, word, (name, len(IMAGES)))
    server.token = SECRET
    server.files["/nih-chest-xrays/data"] = packed(FULL)
    return server


def api_calls(server):
    return [headers for _, path, headers in server.log if path.endswith("DownloadDataset")]


def test_words_and_paths():
    assert all(sources.parse(word) == (word, None) for word in sources.WORDS)
    for source, word, place in (
        *(("chestmnist:a.npz", "chestmnist", "a.npz"), ("a/b.NPZ", "chestmnist", "a/b.NPZ")),
        *(("nih:/x", "nih", "/x"), ("nih:", "folder", "nih:"), ("./kaggle", "folder", "kaggle")),
    ):
        assert sources.parse(source) == (word, Path(place))


def test_phantoms_pass_through_the_reader_of_real_xrays(tmp_path, raw):
    shown = sources.fetch("phantom", raw, n_phantoms=12, seed=3)
    assert (shown["kind"], shown["images"]) == ("phantom", 12)
    assert str(tmp_path) not in json.dumps(shown)
    manifest = preprocess(raw, tmp_path / "out")
    assert (manifest["source"]["kind"], manifest["source"]["seed"]) == ("phantom", 3)
    assert manifest["attribution"] == sources.ATTRIBUTIONS["phantom"]
    images, metadata = data.load(tmp_path / "out", verify=True)
    made, truth = phantom.make_phantoms(12, 3)
    truth = truth.sort_values("image_id")
    np.testing.assert_array_equal(images, made[truth.index])
    for name in ("image_id", "findings", "view_position", "sex", "side", "mirrored"):
        assert metadata[name].tolist() == truth[name].tolist()
    np.testing.assert_array_equal(metadata[["age", "angle"]], truth[["age", "angle"]])


def test_what_is_drawn_is_kept_until_something_else_is_asked_for(raw, monkeypatch):
    shown = sources.fetch("phantom", raw, n_phantoms=3, seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(phantom, "make_phantoms", lambda *_: pytest.fail("drawn again"))
        assert sources.fetch("phantom", raw, n_phantoms=3, seed=0) == shown
    for seed in (0, 1):
        before = visible(raw)
        sources.fetch("phantom", raw, n_phantoms=5, seed=seed)
        assert len(list(raw.rglob("*.png"))) == 5
        assert visible(raw) != before
    made = digits.make_digits(True, n=3)
    monkeypatch.setattr(digits, "make_digits", lambda turned, _: made if turned else (None, None))
    sources.fetch("digits-turned", raw)
    images = [np.asarray(Image.open(path)) for path in sorted(raw.rglob("*.png"))]
    np.testing.assert_array_equal(images, made[0])
    (raw / "source.json").unlink()
    with pytest.raises(ValueError, match="holds files"):  # they may be the user's
        sources.fetch("phantom", raw)


def test_a_kill_while_phantoms_are_written_harms_nothing(raw, dies_at):
    for stop in range(3):
        sources.fetch("phantom", raw, n_phantoms=3)
        with dies_at(stop), pytest.raises(KeyboardInterrupt):
            sources.fetch("phantom", raw, n_phantoms=4)
        sources.fetch("phantom", raw, n_phantoms=4)
        assert len(list(raw.rglob("*.png"))) == 4
        assert list(raw.parent.iterdir()) == [raw]


def test_a_folder_stays_where_it_is(tmp_path, raw):
    folder = make_folder(tmp_path / "xrays", FULL | {".hidden/x.png": b""})
    shown = sources.fetch(folder, raw)
    assert (shown["kind"], shown["images"], shown["csv"]) == ("nih", 6, "Data_Entry_2017.csv")
    assert str(tmp_path) not in json.dumps(shown)
    assert not visible(raw)
    assert preprocess(raw, tmp_path / "out")["images"] == len(IMAGES)
    shown = sources.fetch(make_folder(tmp_path / "own", {"a.jpg": b""}), raw)
    assert (shown["kind"], shown["images"], shown["csv"]) == ("folder", 1, None)


@pytest.mark.parametrize("call", [sources.fetch, preprocess])
def test_what_is_no_folder_of_images_is_named(call, tmp_path, raw):
    make_folder(tmp_path, {"empty/notes.txt": b"", "a.zip": b""})
    for name, word in (("no", "not there"), ("empty", "1 .txt"), ("a.zip", "unpack")):
        with pytest.raises(ValueError, match=f"{name}.*{word}"):
            call(tmp_path / name, raw)
    assert not raw.exists()


def test_kaggle_brings_everything_and_leaves_no_archive(kaggle, tmp_path, raw, capfd):
    shown = sources.fetch("kaggle", raw)
    assert visible(raw.with_name("nih-chest-xrays-data")) == FULL
    assert (shown["kind"], shown["images"], shown["csv"]) == ("nih", 6, "Data_Entry_2017.csv")
    assert preprocess(raw, tmp_path / "out")["patients"] == 3
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in api_calls(kaggle))
    gets = [headers for method, _, headers in kaggle.log if method == "GET"]
    assert not any("Authorization" in headers for headers in gets), "the storage got the token"
    assert len(gets) < len(FULL), "one request for many members"
    text = "".join(capfd.readouterr())
    assert not any(secret in text for secret in (SECRET, SIGNATURE))
    kaggle.log.clear()
    assert sources.fetch("kaggle", raw.with_name("paper")) == shown
    assert kaggle.log == [], "all presets use one download"


def test_kaggles_sample_is_a_zip_in_a_zip_and_has_doubles(kaggle, raw):
    inner = {f"images/{name}": image(i) for i, name in enumerate(IMAGES)}
    inner |= {"sample_labels.csv": table(IMAGES)}
    inner |= {f"sample/{name}": content for name, content in inner.items()}
    kaggle.files["/nih-chest-xrays/sample"] = packed({"sample.zip": packed(inner)})
    shown = sources.fetch("kaggle-sample", raw)
    assert (shown["images"], shown["csv"]) == (len(IMAGES), "sample_labels.csv")
    assert len(visible(raw.parent)) == len(IMAGES) + 1


def test_kaggle_goes_on_after_a_cut_an_expired_address_and_a_kill(kaggle, raw, monkeypatch):
    monkeypatch.setattr(http, "READ_AHEAD", 300)
    store = raw.with_name("nih-chest-xrays-data")
    kaggle.faults = [None, None, None, None, 100, (403, {}), None, (503, {}), *[0] * 9]
    kaggle.refusals = [503]
    with pytest.raises(DownloadError, match="nih-chest-xrays/data from Kaggle: cut"):
        sources.fetch("kaggle", raw)
    assert len(api_calls(kaggle)) == 3
    assert visible(store).items() < FULL.items(), "nothing is half there"
    kaggle.faults = []
    sources.fetch("kaggle", raw)
    assert visible(store) == FULL
    first, second, third = (store / "images_001" / "images" / name for name in IMAGES[:3])
    first.unlink()  # what a user may do
    second.write_bytes(b"cut")
    before = third.stat().st_mtime_ns
    sources.fetch("kaggle", raw)
    assert visible(store) == FULL
    assert third.stat().st_mtime_ns == before, "what is there is not unpacked again"


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, "token"])
def test_what_kaggle_refuses_is_one_line_without_the_token(status, kaggle, raw, capfd):
    kaggle.refusals = [] if status == "token" else [status] * 20
    kaggle.token = "another" if status == "token" else kaggle.token
    word = "KAGGLE_API_TOKEN" if status == "token" else f"nih-chest-xrays/data.*{status}"
    with pytest.raises(DownloadError, match=word) as caught:
        sources.fetch("kaggle", raw)
    text = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert SECRET not in text
    assert "\n" not in str(caught.value)
    assert not visible(raw.parent)


def test_without_credentials_the_steps_are_given(home, tmp_path):
    """A process of its own: the client looks for credentials when it is imported."""
    code = "from lib.data import sources; sources.fetch('kaggle', 'raw/kaggle')"
    kept = {name: value for name, value in os.environ.items() if "KAGGLE" not in name}
    env, command = kept | {"PYTHONPATH": str(paths.ROOT)}, [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    for word in ("DownloadError", "kaggle.com/settings", "KAGGLE_API_TOKEN", "chestmnist"):
        assert word in last
    assert (done.stdout, done.stderr.count("SystemExit")) == ("", 0)


def test_chestmnist_is_downloaded_once_and_checked(server, home, tmp_path, raw, monkeypatch):
    medmnist(tmp_path / "published.npz")
    content = (tmp_path / "published.npz").read_bytes()
    server.files["/file.npz"] = content
    monkeypatch.setattr(chestmnist, "URL", f"{server.url}/file.npz?download=1")
    monkeypatch.setattr(chestmnist, "MD5", hashlib.md5(content).hexdigest())
    server.faults = [None, 5000]
    shown = sources.fetch("chestmnist", raw)
    assert (shown["kind"], shown["images"], shown["csv"]) == ("chestmnist", 12, None)
    assert "MD5" in shown["verified"]
    server.log.clear()
    assert sources.fetch("chestmnist", raw.with_name("paper")) == shown
    assert server.log == []
    monkeypatch.setattr(chestmnist, "MD5", "0")
    shown = sources.fetch(f"chestmnist:{tmp_path / 'published.npz'}", raw)
    assert "not the published file" in shown["origin"]


def nih_box(folder, n=12):
    """What NIH hands out: archives with one folder `images`, and the tables beside them."""
    names = [f"{k + 1:08d}_000.png" for k in range(n)]
    lists = {"Data_Entry_2017_v2020.csv": table(names), "test_list.txt": b"00000001_000.png\n"}
    make_folder(folder, lists | {"README.pdf": b"x"})
    for k, name in enumerate(names):
        make_tar(folder / f"images_{k + 1:03d}.tar.gz", {f"images/{name}": image(k)})
    return folder


def test_nih_archives_are_unpacked_once_beside_their_table(tmp_path, raw):
    box = nih_box(tmp_path / "box")
    before = visible(box)
    shown = sources.fetch(f"nih:{box}", raw)
    assert (shown["images"], shown["csv"]) == (12, "Data_Entry_2017_v2020.csv")
    (store,) = raw.parent.glob("nih-*")
    files = visible(store)
    assert files["images_012/images/00000012_000.png"] == image(11)
    assert len(files) == 14, "images, table and list"
    assert visible(box) == before, "the folder is the user's"
    changed = (store / "images_001").stat().st_mtime_ns
    assert sources.fetch(f"nih:{box}", raw.with_name("paper")) == shown
    assert (store / "images_001").stat().st_mtime_ns == changed, "unpacked twice"


def test_a_nih_folder_that_lacks_something_is_named(tmp_path, raw):
    box = nih_box(tmp_path / "box", 3)
    with pytest.warns(UserWarning, match="3 of NIH's 12 archives"):
        assert sources.fetch(f"nih:{box}", raw)["images"] == 3
    for path in box.glob("*.tar.gz"):
        path.unlink()
    with pytest.raises(ValueError, match="neither images nor"):
        sources.fetch(f"nih:{box}", raw)
    make_folder(box, {f"images/{k:08d}_000.png": image(k) for k in range(2)})
    assert sources.fetch(f"nih:{box}", raw)["images"] == 2, "used where they lie"
    next(box.glob("*.csv")).unlink()
    for place, word in ((box, "no Data_Entry_2017"), (box / "README.pdf", "not a folder")):
        with pytest.raises(ValueError, match=word):
            sources.fetch(f"nih:{place}", raw)
