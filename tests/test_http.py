"""Downloads from a server that cuts, limits and refuses, and archives that are whole or not."""

import errno
import hashlib
import io
import os
import shutil
import traceback
import zipfile

import numpy as np
import pytest

from lib.data import http
from lib.data.http import DownloadError
from tests.server import SIGNATURE, cuts, make_tar, packed, visible

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
FILES = {"images/a.png": CONTENT[:5000], "images/b.png": CONTENT[5000:9000], "table.csv": b"1,2\n"}

pytestmark = cuts


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Nobody waits; how long it would have been is noted."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def download(server, path):
    server.files["/file"] = CONTENT
    return http.download(f"{server.url}/file?X={SIGNATURE}", path, MD5)


def refused(server, path, match):
    """The text and traceback of a download that fails, in one line, and without the address."""
    with pytest.raises(DownloadError, match=match) as caught:
        download(server, path)
    assert "\n" not in str(caught.value)
    assert SIGNATURE not in "".join(traceback.format_exception(caught.value))


def test_an_earlier_call_is_gone_on_with(server, tmp_path, waits):
    server.faults = [None, 1_000_000, *[0] * http.TRIES]
    refused(server, tmp_path / "x", "cut 7 times")
    have = (tmp_path / "x.part").stat().st_size
    assert 700_000 < have <= 1_000_000
    assert sorted(waits) == waits
    server.faults = []
    assert download(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.log[-1][2]["Range"].startswith(f"bytes={have}-")
    (tmp_path / "y.part").write_bytes(CONTENT)
    before = len(server.log)
    assert download(server, tmp_path / "y").read_bytes() == CONTENT
    assert len(server.log) == before + 1, "a part that is complete is only checked"


def test_wrong_bytes_are_thrown_away_and_then_fetched(server, tmp_path):
    for left in (b"another file", bytes(len(CONTENT) + 1)):
        (tmp_path / "x.part").write_bytes(left)
        refused(server, tmp_path / "x", MD5)
        assert not list(tmp_path.iterdir())
    assert download(server, tmp_path / "x").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_when_it_says(server, tmp_path, waits):
    server.faults = [(429, {"Retry-After": "17"}), (503, {}), (500, {})]
    assert download(server, tmp_path / "x").read_bytes() == CONTENT
    assert max(waits) == 17
    server.faults = [(503, {})] * 99
    refused(server, tmp_path / "y", "^y: .*503")
    waits.clear()
    server.faults = [(404, {})] * 9
    refused(server, tmp_path / "z", "^z: .*404")
    assert waits == [], "a refusal is final"


def test_what_cannot_work_is_named(server, tmp_path, monkeypatch):
    server.faults = [(200, {})] * 2
    refused(server, tmp_path / "x", "200, not with a part of the file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    refused(server, tmp_path / "x", r"^x needs 3\.00MB in .*CXR_DATA_DIR")
    assert (tmp_path / "x.part").read_bytes() == b""
    server.url = "http://127.0.0.1:9"
    refused(server, tmp_path / "x", "^x: no connection")
    for reason in (errno.ENOSPC, errno.EACCES):
        with pytest.raises(OSError, match=r"could not write .*x: .*CXR_DATA_DIR") as caught:
            with http.naming_disk_errors(tmp_path / "x"):
                raise OSError(reason, os.strerror(reason))
        assert caught.value.errno == reason


def test_nothing_leaves_the_folder(tmp_path):
    inside = tmp_path / "a" / "b"
    http.unzip(io.BytesIO(packed({"../../evil.png": b"x", "/evil.csv": b"y"})), inside, "the zip")
    assert set(visible(tmp_path)) == {"a/b/evil.png", "a/b/evil.csv"}
    make_tar(tmp_path / "x.tar.gz", {"../evil.png": b"x"})
    with pytest.raises(DownloadError, match=r"x\.tar\.gz"):
        http.untar(tmp_path / "x.tar.gz", tmp_path / "x")
    assert not (tmp_path / "evil.png").exists()


def test_a_damaged_archive_is_named_and_keeps_what_is_whole(tmp_path):
    content = bytearray(packed(FILES, zipfile.ZIP_STORED))
    content[content.index(FILES["images/b.png"]) + 99] ^= 255
    for bad in (content, b"", b"<html>sign in</html>", packed(FILES)[:-30]):
        with pytest.raises(DownloadError, match="the zip is a damaged zip"):
            http.unzip(io.BytesIO(bad), tmp_path, "the zip")
    assert visible(tmp_path) == {"images/a.png": FILES["images/a.png"]}
    make_tar(tmp_path / "x.tar.gz", FILES)
    whole = (tmp_path / "x.tar.gz").read_bytes()
    for keep in (0, 100, 5000, -1):
        (tmp_path / "x.tar.gz").write_bytes(whole[:keep])
        with pytest.raises(DownloadError, match=r"x\.tar\.gz is damaged or cut off"):
            http.untar(tmp_path / "x.tar.gz", tmp_path / "x")
    (tmp_path / "x.tar.gz").write_bytes(whole)
    http.untar(tmp_path / "x.tar.gz", tmp_path / "x")
    assert visible(tmp_path / "x") == FILES
