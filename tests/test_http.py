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
from tests.server import SIGNATURE, Server, make_tar, packed, visible

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
FILES = {"images/a.png": CONTENT[:5000], "images/b.png": CONTENT[5000:9000], "table.csv": b"1,2\n"}

# A connection that the server cuts is collected whenever Python gets to it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def server():
    server = Server()
    server.files["/file"] = CONTENT
    yield server
    server.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Nobody waits; how long it would have been is noted."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def download(server, path, md5=MD5, name="/file"):
    return http.download(f"{server.url}{name}?X={SIGNATURE}", path, md5)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 1_500_000, len(CONTENT) - 1])
def test_a_cut_body_arrives_whole(ranges, cut, server, tmp_path):
    server.ranges = ranges
    server.faults = [None, cut]  # the first answer is for the length
    assert download(server, tmp_path / "x").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert len(server.log) == 3


def test_an_earlier_call_is_gone_on_with(server, tmp_path, waits):
    server.faults = [None, 1_000_000, *[0] * http.TRIES]
    with pytest.raises(DownloadError, match="cut 7 times"):
        download(server, tmp_path / "x")
    have = (tmp_path / "x.part").stat().st_size
    assert 700_000 < have <= 1_000_000
    assert sorted(waits) == waits, "longer and longer"
    server.faults, server.log = [], []
    assert download(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.log[-1][2]["Range"].startswith(f"bytes={have}-")


def test_a_part_that_is_complete_is_only_checked(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT)
    assert download(server, tmp_path / "x").read_bytes() == CONTENT
    assert len(server.log) == 1


@pytest.mark.parametrize("left", [b"another file", bytes(len(CONTENT) + 1)])
def test_wrong_bytes_are_thrown_away_and_then_fetched(left, server, tmp_path):
    (tmp_path / "x.part").write_bytes(left)
    with pytest.raises(DownloadError, match=MD5):
        download(server, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert download(server, tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status, server, tmp_path, waits):
    server.faults = [(status, {"Retry-After": "17"}), (status, {}), (500, {})]
    assert download(server, tmp_path / "x").read_bytes() == CONTENT
    assert 17 in waits
    assert max(waits) == 17
    server.faults = [(status, {})] * 99
    with pytest.raises(DownloadError, match=f"answers {status}"):
        download(server, tmp_path / "y")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_one_line_without_the_address(status, server, tmp_path, waits):
    server.faults = [(status, {})] * 9
    with pytest.raises(DownloadError, match=f"^x: .*{status}") as caught:
        download(server, tmp_path / "x")
    text = "".join(traceback.format_exception(caught.value))
    assert SIGNATURE not in text
    assert "\n" not in str(caught.value)
    assert waits == []


def test_nobody_there(tmp_path):
    with pytest.raises(DownloadError, match=r"^x: no connection") as caught:
        http.download(f"http://127.0.0.1:9/x?X={SIGNATURE}", tmp_path / "x", MD5)
    assert SIGNATURE not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_named_with_what_to_do(reason, tmp_path):
    with pytest.raises(OSError, match=r"could not write .*x: .*CXR_DATA_DIR") as caught:
        with http.naming_disk_errors(tmp_path / "x"):
            raise OSError(reason, os.strerror(reason))
    assert caught.value.errno == reason


def test_space_is_asked_for_first(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(DownloadError, match=r"^x needs 3\.00MB in .*CXR_DATA_DIR"):
        download(server, tmp_path / "x")
    assert (tmp_path / "x.part").read_bytes() == b""


def remote(server, buffer=http.READ_AHEAD):
    return io.BufferedReader(http.RemoteFile(lambda: server.url + "/file", "the file"), buffer)


@pytest.mark.parametrize("buffer", [1000, http.READ_AHEAD])
def test_a_zip_on_a_server_is_read_forwards(buffer, server, tmp_path):
    server.files["/file"] = packed(FILES)
    server.faults = [None, 500, None, 0]
    with remote(server, buffer) as opened:
        assert http.unzip(opened, tmp_path, "the zip") == 3
    assert visible(tmp_path) == FILES
    if buffer == http.READ_AHEAD:
        assert len(server.log) < 8, "one request for many members"


def test_a_file_on_a_server_is_a_file(server):
    with remote(server, 4096) as opened:
        assert opened.read(10) == CONTENT[:10]
        assert opened.seek(-5, io.SEEK_END) == len(CONTENT) - 5
        assert opened.read() == CONTENT[-5:]
        opened.seek(2_000_000)
        assert opened.read(100_000) == CONTENT[2_000_000:2_100_000]
    server.ranges = False
    with pytest.raises(DownloadError, match="no parts"), remote(server) as opened:
        opened.read(1)


def test_an_address_that_expires_is_asked_for_anew(server):
    asked = []

    def address():
        asked.append(1)
        return f"{server.url}/file"

    opened = http.RemoteFile(address, "the file")
    server.faults = [(403, {})]
    assert opened.read(9) == CONTENT[:9]
    assert len(asked) == 2
    server.faults = [(403, {})] * 2
    with opened, pytest.raises(DownloadError, match="403"):
        opened.read(9)


def test_what_is_there_is_not_unpacked_again(tmp_path):
    opened = io.BytesIO(packed(FILES))
    http.unzip(opened, tmp_path, "the zip")
    (tmp_path / "images" / "a.png").write_bytes(bytes(5000))  # what a power cut leaves
    (tmp_path / "images" / "b.png").unlink()
    before = (tmp_path / "table.csv").stat().st_mtime_ns
    http.unzip(opened, tmp_path, "the zip")
    assert visible(tmp_path) == FILES
    assert (tmp_path / "table.csv").stat().st_mtime_ns == before


def test_nothing_leaves_the_folder(tmp_path):
    inside = tmp_path / "a" / "b"
    http.unzip(io.BytesIO(packed({"../../evil.png": b"x", "/evil.csv": b"y"})), inside, "the zip")
    assert set(visible(tmp_path)) == {"a/b/evil.png", "a/b/evil.csv"}


def test_a_damaged_zip_is_named_and_keeps_what_is_whole(tmp_path):
    content = bytearray(packed(FILES, zipfile.ZIP_STORED))
    content[content.index(FILES["images/b.png"]) + 99] ^= 255
    with pytest.raises(DownloadError, match="the zip is a damaged zip"):
        http.unzip(io.BytesIO(content), tmp_path, "the zip")
    assert visible(tmp_path) == {"images/a.png": FILES["images/a.png"]}
    for bad in (b"", b"<html>sign in</html>", packed(FILES)[:-30]):
        with pytest.raises(DownloadError, match="the zip is a damaged zip"):
            http.unzip(io.BytesIO(bad), tmp_path, "the zip")


def test_a_tar_is_unpacked_and_finished_after_a_kill(tmp_path):
    make_tar(tmp_path / "x.tar.gz", FILES)
    http.untar(tmp_path / "x.tar.gz", tmp_path / "x")
    assert visible(tmp_path / "x") == FILES
    (tmp_path / "x" / "images" / "b.png").write_bytes(b"half")
    before = (tmp_path / "x" / "images" / "a.png").stat().st_ino
    http.untar(tmp_path / "x.tar.gz", tmp_path / "x")
    assert visible(tmp_path / "x") == FILES
    assert (tmp_path / "x" / "images" / "a.png").stat().st_ino == before


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_a_tar_that_is_cut_off_is_named(keep, tmp_path):
    make_tar(tmp_path / "x.tar.gz", FILES)
    (tmp_path / "x.tar.gz").write_bytes((tmp_path / "x.tar.gz").read_bytes()[:keep])
    with pytest.raises(DownloadError, match=r"x.tar.gz is damaged or cut off"):
        http.untar(tmp_path / "x.tar.gz", tmp_path / "x")


def test_a_tar_that_leaves_its_folder_is_refused(tmp_path):
    make_tar(tmp_path / "x.tar.gz", {"../evil.png": b"x"})
    with pytest.raises(DownloadError, match=r"x\.tar\.gz"):
        http.untar(tmp_path / "x.tar.gz", tmp_path / "x")
    assert not (tmp_path / "evil.png").exists()
