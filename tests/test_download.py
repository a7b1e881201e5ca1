"""Downloads against a server on 127.0.0.1 that cuts, lies, redirects and refuses: the real kaggle
client is pointed there.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import traceback
import warnings
import zipfile
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image

from lib import data, paths
from lib.data import archives, chestmnist, kaggle_nih
from lib.data import http as transfer
from lib.data import sources as download
from lib.data.http import DownloadError

SECRET = "KGAT_0123456789abcdefSECRET"
SIGNATURE = "SIGNEDsignature"
N_IMAGES = 6


# --------------------------------------------------------------------------------------------------


# A connection that the server cuts is collected with its socket whenever Python gets to it, in this
# test or a later one.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


class Server:
    """Serves `files` with ranges; what it does wrong is set on it."""

    def __init__(self):
        self.files = {}
        self.log = []  # (method, path, headers)
        self.api_answers = []  # (status, headers) of the next API calls; None lets one pass
        self.file_answers = []  # the same of the next requests for a file
        self.cut_at = None  # no answer goes past this byte of a file
        self.cut_once = None  # the same for one answer
        self.step = None  # each answer ends after so many bytes
        self.ranges = True
        self.etag = True
        self.lie = 0  # added to every Content-Length
        self.hops = 1
        self.sent = 0
        self.damage = {}  # byte -> how many more times it is sent wrong
        self.token = SECRET
        self.chunked = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.get(self)

            def do_POST(self):
                server.post(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.elsewhere = (
            f"http://localhost:{self.port}"  # another host to a client: credentials must not follow
        )
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def gets(self):
        return [headers for method, _, headers in self.log if method == "GET"]

    def answer(self, handler, status, headers=None, body=b"", declared=None):
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if declared is None else declared))
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(body)

    def post(self, handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.log.append(("POST", handler.path, dict(handler.headers)))
        asked = json.loads(body)
        if handler.path.endswith("/IntrospectToken"):
            known = asked["token"] == self.token
            answer = {"active": known, "username": "tester" if known else ""}
            return self.answer(
                handler, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
            )
        if self.api_answers and (fault := self.api_answers.pop(0)):
            status, headers = fault
            answer = {
                "code": status,
                "message": f"refused, you sent {handler.headers.get('Authorization')}",
            }
            return self.answer(
                handler,
                200 if headers.pop("as200", False) else status,
                {"Content-Type": "application/json"} | headers,
                json.dumps(answer).encode(),
            )
        if not handler.path.endswith("/v1/datasets.DatasetApiService/DownloadDataset"):
            return self.answer(handler, 404)
        name = f"{asked['ownerSlug']}/{asked['datasetSlug']}"
        self.answer(
            handler,
            302,
            {"Location": f"{self.elsewhere}/hop/{self.hops - 1}/{name}?Signature={SIGNATURE}"},
        )

    def get(self, handler):
        self.log.append(("GET", handler.path, dict(handler.headers)))
        path = handler.path.split("?")[0]
        if hop := re.match(r"/hop/(\d+)(/.*)", path):
            if int(hop[1]):
                return self.answer(
                    handler,
                    302,
                    {"Location": f"/hop/{int(hop[1]) - 1}{hop[2]}?Signature={SIGNATURE}"},
                )
            path = hop[2]
        range_ = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        if range_ and self.file_answers and (fault := self.file_answers.pop(0)):
            return self.answer(handler, fault[0], fault[1])
        content = self.files.get(path)
        if content is None:
            return self.answer(handler, 404)
        start = int(range_[1]) if range_ and self.ranges else 0
        if range_ and self.ranges and start >= len(content):
            return self.answer(handler, 416, {"Content-Range": f"bytes */{len(content)}"})
        end = len(content)
        if self.cut_once is not None and range_ and start <= self.cut_once:
            end, self.cut_once = min(end, self.cut_once), None
        if self.cut_at is not None and range_:
            end = min(end, self.cut_at)
        if self.step is not None:
            end = min(end, start + self.step)
        body = bytearray(content[start : max(start, end)])
        for place, times in self.damage.items():
            if range_ and times and start <= place < end:
                body[place - start] ^= 0xFF
                self.damage[place] -= 1
        self.sent += len(body) if range_ else 0
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'} if self.etag else {}
        if range_ and self.ranges:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content) + self.lie}"
            self.answer(handler, 206, headers, bytes(body), len(content) - start + self.lie)
        elif self.chunked:
            handler.send_response(200)
            handler.end_headers()  # its end is where the connection ends
            handler.wfile.write(body)
        else:
            self.answer(handler, 200, headers, bytes(body), len(content) + self.lie)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch):
    """Nobody waits; how long it would have been is noted."""
    waited = []
    monkeypatch.setattr(transfer, "_sleep", waited.append)
    return waited


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without any credential."""
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    for name in list(os.environ):
        if (
            name.startswith("KAGGLE_")
            or name in ("VERBOSE", "VERBOSE_OUTPUT")
            or name.lower().endswith("_proxy")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    return home


@pytest.fixture
def kaggle(server, home, waits, monkeypatch):
    """The real client, its table of addresses pointed at the server, and a token."""
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    for word, members in (("kaggle", nih_members()), ("kaggle-sample", sample_members())):
        kaggle_set = kaggle_nih.SETS[word]
        monkeypatch.setitem(
            kaggle_nih.SETS, word, kaggle_nih.KaggleSet(kaggle_set.owner, kaggle_set.name, N_IMAGES)
        )
        server.files[f"/{kaggle_set.label}"] = make_zip(members)
    return server


def png(seed, size=8):
    buffer = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    ).save(buffer, "PNG")
    return buffer.getvalue()


TABLE = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    + "".join(
        f"{i // 2 + 1:08d}_{i % 2:03d}.png,{'Mass|Effusion' if i % 2 else 'No Finding'},{i % 2},{i // 2 + 1},057Y,M,PA\n"
        for i in range(N_IMAGES)
    )
)


def nih_members():
    members = {
        f"images_{i // 3 + 1:03d}/images/{i // 2 + 1:08d}_{i % 2:03d}.png": png(i)
        for i in range(N_IMAGES)
    }
    return (
        {"Data_Entry_2017.csv": TABLE.encode()}
        | members
        | {"BBox_List_2017.csv": b"Image Index,Finding Label\n", "empty.txt": b""}
    )


def sample_members():
    """Every image twice, as on Kaggle."""
    images = {f"images/{i // 2 + 1:08d}_{i % 2:03d}.png": png(i) for i in range(N_IMAGES)}
    once = {f"sample/{name}": content for name, content in images.items()} | {
        "sample/sample_labels.csv": TABLE.encode()
    }
    return (
        once
        | {f"sample/{name}": content for name, content in once.items()}
        | {"sample_labels.csv": TABLE.encode()}
    )


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            if not isinstance(name, zipfile.ZipInfo):
                info.compress_type = (
                    zipfile.ZIP_DEFLATED if name.endswith(".csv") else zipfile.ZIP_STORED
                )
            archive.writestr(info, content)
    return buffer.getvalue()


def visible(folder):
    """All files but hidden ones: what a reader of the folder would see."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != "source.json"
    }


def remote(server, name="/file", **options):
    request = requests.Request("GET", server.url + name).prepare()
    return transfer.Remote(lambda: request, "the file", **options)


def no_secret(text):
    assert SECRET not in text
    assert SIGNATURE not in text


# --------------------------------------------------------------------------------------------------


CONTENT = np.random.default_rng(0).bytes(3000)
CONTENT_MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_cut_at_any_byte_arrives_whole_and_goes_on_where_it_was_cut(
    ranges, server, waits, tmp_path
):
    server.files["/file"] = CONTENT
    server.ranges = ranges
    cuts = [0, 1, 2, len(CONTENT) - 1, *range(7, len(CONTENT), 31)]
    for cut in cuts:
        server.cut_once, server.sent = None, 0
        link = remote(server)
        link.probe()
        link.close()
        server.cut_once, server.sent = cut, 0
        path = transfer.fetch_file(link, tmp_path / f"{cut}.bin", len(CONTENT), CONTENT_MD5)
        assert path.read_bytes() == CONTENT
        assert list(tmp_path.glob("*.part")) == []
        if ranges:
            assert server.sent == len(CONTENT), "a byte was sent twice"
    assert len(cuts) >= 100


def test_one_byte_an_answer_is_progress(server, waits, tmp_path):
    server.files["/file"] = CONTENT[:40]
    server.step = 1
    assert transfer.fetch_file(remote(server), tmp_path / "x", 40).read_bytes() == CONTENT[:40]
    assert max(waits) < 2  # patience starts anew with every byte


def test_what_an_earlier_call_left_is_used(server, waits, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_NEAR", 0)  # so small a file would be read over from its start
    server.files["/file"] = CONTENT
    for cut in range(0, len(CONTENT), 250):
        server.cut_at = cut
        with pytest.raises(
            DownloadError,
            match=r"the file: lost the connection \(.*\)( at byte [\d,]+ of 3,000)?, 7 times in a row; check the network",
        ):
            transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5)
        assert not (tmp_path / "x").exists()
        assert (tmp_path / "x.part").read_bytes() == CONTENT[:cut]
    server.cut_at, server.sent = None, 0
    server.log.clear()
    transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.gets[-1]["Range"] == "bytes=2750-"


def test_damage_on_the_way_is_noticed_and_mended_once(server, waits, tmp_path):
    server.files["/file"] = CONTENT
    server.damage = {1234: 1}
    assert (
        transfer.fetch_file(remote(server), tmp_path / "x", None, CONTENT_MD5).read_bytes()
        == CONTENT
    )
    server.damage = {1234: 10**6}
    with pytest.raises(
        DownloadError,
        match=r"damaged, twice \(MD5 [0-9a-f]{32}, not [0-9a-f]{32}\), and was thrown away",
    ) as caught:
        transfer.fetch_file(remote(server), tmp_path / "y", None, CONTENT_MD5)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_part_of_another_file_is_thrown_away(server, waits, tmp_path):
    server.files["/file"] = CONTENT
    for left in (b"wrong", bytes(len(CONTENT)), bytes(len(CONTENT) + 9)):
        (tmp_path / "x.part").write_bytes(left)
        assert (
            transfer.fetch_file(
                remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5
            ).read_bytes()
            == CONTENT
        )


@pytest.mark.parametrize("lie", [-5, 5])
def test_wrong_lengths(lie, server, waits, tmp_path):
    server.files["/file"] = CONTENT
    server.lie = lie
    with pytest.raises(
        DownloadError,
        match=r"the server offers 3,?\d+ bytes and the file has 3,000|offers 2,995 bytes",
    ):
        transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5)
    if lie > 0:  # nothing but the server says how long it is
        with pytest.raises(
            DownloadError, match=r"shorter than what is here \(416\)|lost the connection"
        ):
            transfer.fetch_file(remote(server), tmp_path / "x")
    else:
        with pytest.raises(DownloadError, match="damaged, twice"):
            transfer.fetch_file(remote(server), tmp_path / "x", None, CONTENT_MD5)
    assert not (tmp_path / "x").exists()


def test_no_length_at_all(server, waits, tmp_path):
    server.files["/file"] = CONTENT
    server.ranges, server.chunked = False, True
    assert (
        transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5).read_bytes()
        == CONTENT
    )
    assert transfer.fetch_file(remote(server), tmp_path / "y").read_bytes() == CONTENT


def test_a_file_that_changes_between_two_answers(server, waits, tmp_path):
    server.files["/file"] = CONTENT
    server.cut_once = 100
    link = remote(server).probe()
    link.close()
    server.files["/file"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match="changed while it was read"):
        transfer.fetch_file(link, tmp_path / "x")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"the file: the server refuses the credentials \(401\); "),
        (403, r"the file: the server does not allow it \(403\); "),
        (404, r"the file: the server does not have it \(404\); look there"),
        (418, r"the file: the server refuses \(418\); "),
    ],
)
def test_a_refusal_is_one_line_and_not_tried_again(status, message, server, waits, tmp_path):
    server.files["/file"] = CONTENT
    server.file_answers = [(status, {})] * 9
    with pytest.raises(DownloadError, match=message) as caught:
        transfer.fetch_file(remote(server, hints={404: "look there"}), tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    assert len(server.gets) == 1
    assert waits == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_busy_servers_are_asked_again_after_longer_and_longer(status, server, waits, tmp_path):
    server.files["/file"] = CONTENT
    server.file_answers = [(status, {})] * 4
    assert transfer.fetch_file(remote(server), tmp_path / "x").read_bytes() == CONTENT
    assert len(waits) == 4
    assert all(0.75 * 2**k <= wait <= 1.25 * 2**k for k, wait in enumerate(waits))
    server.file_answers = [(status, {})] * 99
    with pytest.raises(
        DownloadError,
        match=rf"the file: the server .* \({status}\), 7 times in a row; check the network",
    ):
        transfer.fetch_file(remote(server), tmp_path / "y")


def test_retry_after_is_honoured(server, waits, tmp_path):
    server.files["/file"] = CONTENT
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.file_answers = [
        (429, {"Retry-After": "17"}),
        (503, {"Retry-After": soon}),
        (429, {"Retry-After": "nonsense"}),
    ]
    transfer.fetch_file(remote(server), tmp_path / "x")
    assert waits[0] == 17
    assert 27 <= waits[1] <= 30
    assert waits[2] < 6
    server.file_answers = [(429, {"Retry-After": "3600"})]
    with pytest.raises(
        DownloadError,
        match=r"limits how often it may be asked \(429\) and asks to wait 60 minutes; the same command",
    ):
        transfer.fetch_file(remote(server), tmp_path / "y")


def test_nobody_there(waits, tmp_path):
    request = requests.Request("GET", "http://127.0.0.1:9/x?Signature=" + SIGNATURE).prepare()
    with pytest.raises(
        DownloadError,
        match=r"^the file: lost the connection \(Connection refused\), 7 times in a row",
    ) as caught:
        transfer.fetch_file(transfer.Remote(lambda: request, "the file"), tmp_path / "x")
    no_secret("".join(traceback.format_exception(caught.value)))


def test_redirects_without_end(server, waits, tmp_path):
    server.files["/x"] = CONTENT
    assert transfer.fetch_file(remote(server, "/hop/3/x"), tmp_path / "x").read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"cannot be followed \(TooManyRedirects\)"):
        transfer.fetch_file(remote(server, "/hop/99/x"), tmp_path / "y")


@pytest.mark.parametrize(
    ("headers", "md5"),
    [
        (
            {"X-Goog-Hash": "crc32c=AAAAAA==,md5=XrY7u+Ae7tCTyyK7j1rNww=="},
            "5eb63bbbe01eeed093cb22bb8f5acdc3",
        ),
        ({"Content-MD5": "XrY7u+Ae7tCTyyK7j1rNww=="}, "5eb63bbbe01eeed093cb22bb8f5acdc3"),
        ({"Content-MD5": "5eb63bbbe01eeed093cb22bb8f5acdc3"}, "5eb63bbbe01eeed093cb22bb8f5acdc3"),
        ({"ETag": '"md5:5eb63bbbe01eeed093cb22bb8f5acdc3"'}, "5eb63bbbe01eeed093cb22bb8f5acdc3"),
        (
            {"ETag": '"5eb63bbbe01eeed093cb22bb8f5acdc3"'},
            None,
        ),  # of a store that may mean something else by it
        ({}, None),
    ],
)
def test_checksums_that_servers_state(headers, md5):
    assert transfer.declared_md5(headers) == md5
    assert md5 in (None, hashlib.md5(b"hello world").hexdigest())


def test_a_full_disk_is_said_before_the_first_byte(server, waits, tmp_path, monkeypatch):
    server.files["/file"] = CONTENT
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 2999)
    )
    with pytest.raises(
        DownloadError,
        match=r"^x needs 3\.0 kB in .*, and 3\.0 kB are free: free some space, or .* CXR_DATA_DIR",
    ) as caught:
        transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "x.part").read_bytes() == b""


class Full(io.FileIO):
    """A disk that is full after `room` bytes."""

    room = 0

    def write(self, block):
        if self.tell() + len(block) > Full.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


@pytest.fixture
def full_disk(monkeypatch):
    """Files that the two modules open for writing fill up."""

    def opened(path, mode="r", *args, **kwargs):
        return (
            Full(path, mode.replace("b", ""))
            if mode in ("wb", "ab") and not str(path).endswith(".json")
            else open(path, mode, *args, **kwargs)
        )

    def fill(room):
        Full.room = room
        for module in (transfer, archives):
            monkeypatch.setattr(module, "open", opened, raising=False)

    return fill


def test_a_disk_that_fills_up_keeps_what_came(server, waits, tmp_path, full_disk, monkeypatch):
    server.files["/file"] = CONTENT
    monkeypatch.setattr(transfer, "_BLOCK", 100)
    full_disk(1000)
    with pytest.raises(
        OSError,
        match=r"could not write .*x.part: No space left.*; free some space.* goes on from there",
    ) as caught:
        transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5)
    assert caught.value.errno == errno.ENOSPC
    assert 900 <= (tmp_path / "x.part").stat().st_size <= 1000
    full_disk(10**6)
    assert (
        transfer.fetch_file(remote(server), tmp_path / "x", len(CONTENT), CONTENT_MD5).read_bytes()
        == CONTENT
    )


def test_a_folder_that_cannot_be_written(server, waits, tmp_path, monkeypatch):
    server.files["/file"] = CONTENT
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.name != "posix" or os.geteuid() == 0:  # whom permissions do not bind

        def refused(path, *_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(transfer, "open", refused, raising=False)
    with pytest.raises(
        OSError,
        match=r"could not write .*: Permission denied; .* choose another folder with CXR_DATA_DIR",
    ):
        transfer.fetch_file(remote(server), locked / "x")
    assert server.log == [], "asked before it looked"


def test_a_file_in_the_place_of_the_folder(server, waits, tmp_path):
    server.files["/file"] = CONTENT
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError,
        match=r"could not write .*x: (Not a directory|File exists).*; .* choose another folder with CXR_DATA_DIR",
    ):
        transfer.fetch_file(remote(server), tmp_path / "file" / "x")
    assert server.log == []


# --------------------------------------------------------------------------------------------------


def test_kaggle_brings_everything_and_leaves_no_archive(kaggle, tmp_path, capfd):
    raw = tmp_path / "raw" / "kaggle"
    shown = data.fetch("kaggle", raw)
    store = tmp_path / "raw" / "nih-chest-xrays-data"
    assert visible(store) == nih_members()
    assert [path.name for path in store.rglob(".*")] == [".whole.json"]
    assert shown["kind"] == "nih"
    assert shown["images"] == N_IMAGES
    assert shown["csv"] == "Data_Entry_2017.csv"
    assert shown["origin"] == "nih-chest-xrays/data from Kaggle"
    assert "CRC-32" in shown["verified"]
    manifest = data.preprocess(raw, tmp_path / "out")
    assert manifest["images"] == N_IMAGES
    assert manifest["patients"] == N_IMAGES // 2
    # the credential goes to Kaggle and not to where Kaggle sends us
    for method, path, headers in kaggle.log:
        assert headers.get("Authorization") == (
            f"Bearer {SECRET}"
            if method == "POST" and "DownloadDataset" in path
            else headers.get("Authorization")
        )
        if method == "GET":
            assert "Authorization" not in headers
    assert any(
        headers.get("Authorization") == f"Bearer {SECRET}"
        for method, path, headers in kaggle.log
        if "DownloadDataset" in path
    )
    out, error = capfd.readouterr()
    no_secret(out + error)
    assert out == ""
    assert re.search(r"100%.*B/s", error), "no progress with a rate"
    # all presets use it, and nobody asks the server again
    kaggle.log.clear()
    assert data.fetch("kaggle", tmp_path / "raw" / "kaggle-paper") == shown
    assert kaggle.log == []


def test_kaggles_sample_is_taken_once(kaggle, tmp_path):
    shown = data.fetch("kaggle-sample", tmp_path / "raw" / "kaggle-sample")
    files = visible(tmp_path / "raw" / "nih-chest-xrays-sample")
    assert shown["images"] == N_IMAGES
    assert shown["csv"] == "sample_labels.csv"
    assert sorted(name.count("/") for name in files) == [0, *[2] * N_IMAGES]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            data.preprocess(tmp_path / "raw" / "kaggle-sample", tmp_path / "out")["dropped"] == []
        )


def test_a_zip_within_the_zip(kaggle, tmp_path):
    inner = {
        name.removeprefix("sample/"): content
        for name, content in sample_members().items()
        if name.count("/") == 2
    }
    kaggle.files["/nih-chest-xrays/sample"] = make_zip(
        {"sample.zip": make_zip(inner), "sample_labels.csv": TABLE.encode()}
    )
    shown = data.fetch("kaggle-sample", tmp_path / "raw" / "x")
    assert shown["images"] == N_IMAGES
    assert not list((tmp_path / "raw").rglob("*.zip"))
    kaggle.log.clear()
    data.fetch("kaggle-sample", tmp_path / "raw" / "x")
    assert kaggle.log == []


def cut_points(content, n):
    """Every kind of place: the last bytes (the directory's end), the directory, and all over the
    members.
    """
    return sorted(
        {
            0,
            1,
            len(content) - 1,
            len(content) - 22,
            *np.linspace(0, len(content) - 1, n).astype(int).tolist(),
        }
    )


@pytest.mark.parametrize("buffer", [64, 2**20])
def test_kaggle_cut_at_any_byte(buffer, kaggle, tmp_path, monkeypatch):
    """One connection breaks at a byte and the next goes on: every file is right."""
    monkeypatch.setattr(download, "_BUFFER", buffer)
    monkeypatch.setattr(transfer, "_NEAR", buffer // 2)
    content = kaggle.files["/nih-chest-xrays/data"]
    cuts = cut_points(content, 110)
    for cut in cuts:
        kaggle.cut_once, kaggle.sent = int(cut), 0
        raw = tmp_path / str(cut) / "kaggle"
        assert download.obtain("kaggle", raw)["images"] == N_IMAGES
        assert visible(raw.with_name("nih-chest-xrays-data")) == nih_members()
        shutil.rmtree(raw.parent)
    assert len(cuts) >= 110


def test_kaggle_broken_off_at_any_byte_and_called_again(kaggle, tmp_path, monkeypatch):
    """Nothing lost: what is whole is not asked for again. Nothing half-taken: no file is there that
    is not whole.
    """
    monkeypatch.setattr(transfer, "TRIES", 2)
    members, content = nih_members(), kaggle.files["/nih-chest-xrays/data"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        directory = archive.start_dir
        ends = {
            info.filename: info.header_offset + 30 + len(info.filename) + info.compress_size
            for info in archive.infolist()
        }
    cuts = cut_points(content[:directory], 100)
    for cut in cuts:
        raw = tmp_path / str(cut) / "kaggle"
        store = raw.with_name("nih-chest-xrays-data")
        # the directory at the end arrives, the members do not: another cut than one of the whole
        original = kaggle.get

        def get(handler, cut=cut, original=original):
            start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
            kaggle.cut_at = cut if start < directory else None
            original(handler)

        kaggle.get = get
        with pytest.raises(
            DownloadError, match="nih-chest-xrays/data from Kaggle: lost the connection"
        ):
            download.obtain("kaggle", raw)
        kaggle.get, kaggle.cut_at = original, None
        there = visible(store) if store.exists() else {}
        assert there.items() <= members.items(), "a file that is not whole"
        assert {name for name, end in ends.items() if end <= cut} - {"empty.txt"} <= set(there) | {
            "empty.txt"
        }, "a whole file was lost"
        assert not [path for path in tmp_path.rglob("*.part")]
        kaggle.sent = 0
        download.obtain("kaggle", raw)
        assert visible(store) == members
        shutil.rmtree(raw.parent)
    assert len(cuts) >= 100


def test_kaggle_without_ranges(kaggle, tmp_path, monkeypatch):
    """A server that sends no parts: the archive is kept meanwhile, checked, and gone at the end;
    space is asked for both.
    """
    kaggle.ranges = False
    store = tmp_path / "nih-chest-xrays-data"
    kaggle.cut_once = 500
    assert download.obtain("kaggle", tmp_path / "kaggle")["images"] == N_IMAGES
    assert visible(store) == nih_members()
    assert not (store / ".archive.zip").exists()
    kaggle.damage = {kaggle.files["/nih-chest-xrays/sample"].index(png(2)) + 50: 1}
    with pytest.raises(
        DownloadError, match="is damaged, twice"
    ):  # an archive that lies here does not mend itself
        download.obtain("kaggle-sample", tmp_path / "kaggle-sample")
    assert download.obtain("kaggle-sample", tmp_path / "kaggle-sample")["images"] == N_IMAGES
    shutil.rmtree(tmp_path / "nih-chest-xrays-sample")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**28))
    with pytest.raises(
        DownloadError,
        match="whose server sends no parts, so that archive and images must lie here at once, needs",
    ):
        download.obtain("kaggle-sample", tmp_path / "kaggle-sample")


def test_a_file_that_was_damaged_here_is_fetched_again(kaggle, tmp_path):
    store = tmp_path / "nih-chest-xrays-data"
    download.obtain("kaggle", tmp_path / "kaggle")
    damaged = store / "images_001" / "images" / "00000001_000.png"
    damaged.write_bytes(bytes(damaged.stat().st_size))  # what a power cut leaves
    (store / ".whole.json").unlink()
    (store / "empty.txt").unlink()
    download.obtain("kaggle", tmp_path / "kaggle")
    assert visible(store) == nih_members()
    damaged.unlink()  # and what a user deletes
    download.obtain("kaggle", tmp_path / "kaggle")
    assert visible(store) == nih_members()


def test_damage_inside_a_member(kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_NEAR", 0)
    content = kaggle.files["/nih-chest-xrays/data"]
    place = content.index(png(2)) + 50
    kaggle.damage = {place: 2}  # once on the connection that only asks, and once in what is read
    download.obtain("kaggle", tmp_path / "a" / "kaggle")
    assert kaggle.damage == {place: 0}
    assert visible(tmp_path / "a" / "nih-chest-xrays-data") == nih_members()
    kaggle.damage = {place: 10**6}
    with pytest.raises(
        DownloadError,
        match=r"nih-chest-xrays/data: its member 'images_001/images/00000002_000.png' is damaged, twice",
    ):
        download.obtain("kaggle", tmp_path / "b" / "kaggle")
    assert visible(tmp_path / "b" / "nih-chest-xrays-data").items() < nih_members().items()


@pytest.mark.parametrize("as200", [False, True])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            r"refuses the credentials \(401\); make a new token at https://www.kaggle.com/settings/api",
        ),
        (
            403,
            r"does not allow it \(403\); open https://www.kaggle.com/datasets/nih-chest-xrays/data while signed in",
        ),
        (
            404,
            r"does not have it \(404\); see whether https://www.kaggle.com/datasets/nih-chest-xrays/data is still there",
        ),
        (429, r"limits how often it may be asked \(429\), 7 times in a row"),
        (500, r"is in trouble \(500\), 7 times in a row"),
    ],
)
def test_what_kaggle_refuses_is_one_line_without_the_credential(
    status, message, as200, kaggle, tmp_path, capfd, caplog
):
    kaggle.api_answers = [(status, {"as200": as200}) for _ in range(20)]
    with caplog.at_level("DEBUG"), pytest.raises(DownloadError, match=message) as caught:
        download.obtain("kaggle", tmp_path / "raw" / "kaggle")
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    out, error = capfd.readouterr()
    no_secret("".join(traceback.format_exception(caught.value)) + out + error + caplog.text)
    assert not visible(tmp_path / "raw")


@pytest.mark.parametrize("where", ["the API", "the storage"])
def test_a_server_that_says_nothing_more(where, kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", (0.2, 0.2))
    monkeypatch.setattr(transfer, "TRIES", 2)
    silent = threading.Event()
    original = {"the API": kaggle.post, "the storage": kaggle.get}[where]

    def wait(handler):
        if where == "the API" and handler.path.endswith("/IntrospectToken"):
            return original(handler)
        silent.wait(5)
        handler.close_connection = True

    setattr(kaggle, {"the API": "post", "the storage": "get"}[where], wait)
    with pytest.raises(
        DownloadError, match=r"lost the connection \(no answer in time\), 2 times in a row"
    ):
        download.obtain("kaggle", tmp_path / "kaggle")
    silent.set()


def test_kaggle_recovers_from_trouble(kaggle, waits, tmp_path):
    kaggle.api_answers = [(429, {"Retry-After": "9"}), (500, {}), None]
    kaggle.file_answers = [(503, {}), (429, {})]
    assert download.obtain("kaggle", tmp_path / "kaggle")["images"] == N_IMAGES
    assert waits[0] == 9
    assert len(waits) == 4


@pytest.mark.parametrize("status", [400, 403, 404])
def test_an_address_that_expires_is_asked_for_anew(status, kaggle, waits, tmp_path):
    kaggle.cut_once = 700
    kaggle.file_answers = [None, None, None, (status, {})]
    assert download.obtain("kaggle", tmp_path / "kaggle")["images"] == N_IMAGES
    assert sum("DownloadDataset" in path for _, path, _ in kaggle.log) == 2
    assert visible(tmp_path / "nih-chest-xrays-data") == nih_members()


def test_kaggle_with_a_full_disk(kaggle, tmp_path, monkeypatch, full_disk):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10**6))
        with pytest.raises(
            DownloadError,
            match=r"nih-chest-xrays/data \(9 files\) needs 268\.\d MB in .*, and 1\.0 MB are free",
        ):
            download.obtain("kaggle", tmp_path / "raw" / "kaggle")
    assert not visible(tmp_path / "raw"), "something was written before"
    full_disk(150)  # the table has more
    with pytest.raises(
        OSError, match=r"could not write .*\.csv: No space left.*same command goes on"
    ):
        download.obtain("kaggle", tmp_path / "raw" / "kaggle")
    assert not list((tmp_path / "raw").rglob("*.part"))
    full_disk(10**6)
    download.obtain("kaggle", tmp_path / "raw" / "kaggle")
    assert visible(tmp_path / "raw" / "nih-chest-xrays-data") == nih_members()


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["token", "token in a file", "access_token", "user and key", "kaggle.json", "login"]
)
def test_every_way_to_give_a_credential(way, kaggle, home, tmp_path, monkeypatch, capfd):
    from kaggle.api.kaggle_api_extended import KaggleApi

    expected = f"Bearer {SECRET}"
    if way != "token":
        monkeypatch.delenv("KAGGLE_API_TOKEN")
    if way == "token in a file":
        (tmp_path / "token").write_text(SECRET)
        monkeypatch.setenv("KAGGLE_API_TOKEN", str(tmp_path / "token"))
    elif way == "access_token":
        (home / ".kaggle" / "access_token").write_text(SECRET + "\n")
    elif way == "user and key":
        monkeypatch.setenv("KAGGLE_USERNAME", "tester")
        monkeypatch.setenv("KAGGLE_KEY", SECRET)
        expected = requests.auth._basic_auth_str("tester", SECRET)
    elif way == "kaggle.json":
        (home / ".kaggle" / "kaggle.json").write_text(
            json.dumps({"username": "tester", "key": SECRET})
        )
        monkeypatch.setattr(
            KaggleApi, "config", str(home / ".kaggle" / "kaggle.json")
        )  # it was looked up on import
        expected = requests.auth._basic_auth_str("tester", SECRET)
    elif way == "login":
        expires = (datetime.now(UTC) + timedelta(hours=5)).isoformat()
        held = {
            "refresh_token": "r",
            "access_token": SECRET,
            "access_token_expiration": expires,
            "username": "tester",
        }
        (home / ".kaggle" / "credentials.json").write_text(json.dumps(held))
    monkeypatch.setenv("VERBOSE", "1")  # with which the client prints its headers
    assert download.obtain("kaggle", tmp_path / "kaggle")["images"] == N_IMAGES
    sent = {
        headers.get("Authorization") for _, path, headers in kaggle.log if "DownloadDataset" in path
    }
    assert sent == {expected}
    assert os.environ["VERBOSE"] == "1"
    out, error = capfd.readouterr()
    no_secret(out + error)


def test_a_token_that_is_not_taken_is_told_from_none(kaggle, tmp_path):
    kaggle.token = "another"
    with pytest.raises(
        DownloadError,
        match="it does not take the token in KAGGLE_API_TOKEN: it is mistyped, expired or revoked",
    ) as caught:
        download.obtain("kaggle", tmp_path / "kaggle")
    no_secret("".join(traceback.format_exception(caught.value)))


def assert_three_steps(text):
    assert "none were found" in text
    assert all(
        step in text
        for step in (
            "(1) sign in",
            "(2) make a token",
            "(3) put it into",
            "KAGGLE_API_TOKEN",
            "~/.kaggle/access_token",
        )
    )
    assert "--data chestmnist" in text
    assert "--data phantom" in text
    assert "Authentication required" not in text, "the client's own help got through"
    assert "SystemExit" not in text
    assert "NameError" not in text


def bare_environment(home):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KAGGLE_") and not name.lower().endswith("_proxy")
    }
    return kept | {
        "HOME": str(home),
        "USERPROFILE": str(home),
        "PYTHONPATH": str(paths.ROOT),
        "CXR_DATA_DIR": str(home / "data"),
    }


CALL = "from pathlib import Path\nfrom lib import download\ndownload.obtain('kaggle', Path('raw') / 'kaggle')\n"


def test_without_credentials_in_a_program(home, tmp_path):
    """A process of its own: the client looks for credentials on import, once."""
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=tmp_path,
        env=bare_environment(home),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert_three_steps(done.stderr)
    assert "During handling" not in done.stderr
    assert not visible(tmp_path / "raw")


def test_without_credentials_in_a_jupyter_kernel(home, tmp_path, monkeypatch):
    """There is no `exit` in a kernel, so the client fails in another way there."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name, value in bare_environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CALL), nbformat.v4.new_code_cell("print('alive')")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(
            notebook,
            timeout=60,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
    outputs = notebook.cells[0].outputs
    (failure,) = [output for output in outputs if output.output_type == "error"]
    assert failure.ename == "DownloadError"
    assert_three_steps(failure.evalue)
    assert "Authentication required" not in json.dumps(outputs)
    assert notebook.cells[1].outputs[0].text == "alive\n"


def test_the_client_is_imported_by_nobody_but_kaggle():
    code = "import sys, lib.data, lib.run; sys.exit('kaggle' in sys.modules or 'kagglesdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, timeout=60).returncode == 0


def test_a_home_in_which_the_client_can_make_no_folder(home, tmp_path):
    (tmp_path / "file").touch()
    environment = bare_environment(home) | {"KAGGLE_CONFIG_DIR": str(tmp_path / "file" / "folder")}
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.search(
        r"DownloadError: Kaggle's client cannot use its folder \(.*\); name another one with KAGGLE_CONFIG_DIR",
        done.stderr,
    )


# --------------------------------------------------------------------------------------------------


def member(name, mode=0o100644, **fields):
    info = zipfile.ZipInfo("placeholder")
    info.filename, info.external_attr = name, mode << 16
    for field, value in fields.items():
        setattr(info, field, value)
    return info


HOSTILE = {
    "parent": ("../evil.txt", "leads out of the folder"),
    "parent inside": ("images/../../evil.txt", "leads out of the folder"),
    "absolute": ("/etc/evil.txt", "has an absolute name"),
    "drive": ("C:/evil.txt", "has an absolute name"),
    "drive relative": ("C:evil.txt", "has an absolute name"),
    "backslash": ("..\\evil.txt", "has a name that not every system can write"),
    "stream": ("images/a.png:evil", "has a name that not every system can write"),
    "device": ("images/CON.png", "has a name that not every system can write"),
    "dot": ("images/./evil.txt", "has a name that not every system can write"),
    "double slash": ("images//evil.txt", "has a name that not every system can write"),
    "trailing dot": ("images./evil.txt", "has a name that not every system can write"),
    "newline": ("images/a\nb.png", "has a name that not every system can write"),
    "nul": ("images/a.png\0.exe", "has a name that not every system can write"),
    "bidi": ("images/a\u202egnp.exe", "has a name that not every system can write"),
    "long": ("a" * 500, "has no usable name"),
    "link": (member("images/link", 0o120777), "is a link"),
    "pipe": (member("images/pipe", 0o010644), "is neither a file nor a folder"),
    "device file": (member("images/dev", 0o020644), "is neither a file nor a folder"),
    "folder that is a file": (member("images/x", 0o040755), "is neither a file nor a folder"),
    "twice": ("Data_Entry_2017.csv", "is there twice"),
    "twice but for case": ("DATA_entry_2017.csv", "is there twice"),
    "file and folder": ("Data_Entry_2017.csv/x.png", "is there twice"),
    "folder and file": ("images_001", "is there twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_zips_are_refused_before_anything_is_unpacked(case, kaggle, tmp_path):
    name, reason = HOSTILE[case]
    name = name if isinstance(name, zipfile.ZipInfo) else member(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for good, content in nih_members().items():
                archive.writestr(good, content)
            archive.writestr(name, b"evil")
    kaggle.files["/nih-chest-xrays/data"] = buffer.getvalue()
    for kaggle.ranges in (True, False):
        with pytest.raises(
            DownloadError,
            match=rf"nih-chest-xrays/data is refused: its member .* {reason}; nothing was unpacked",
        ) as caught:
            download.obtain("kaggle", tmp_path / "raw" / "kaggle")
        assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parts[-2] != "home"]


def patched(content, **fields):
    """A zip whose directory says something else of its first member than its content."""
    content = bytearray(content)
    start = content.index(b"PK\x01\x02")
    for field, value in fields.items():
        place, length = {
            "flags": (8, 2),
            "method": (10, 2),
            "packed": (20, 4),
            "size": (24, 4),
            "crc": (16, 4),
            "offset": (42, 4),
        }[field]
        content[start + place : start + place + length] = value.to_bytes(length, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"flags": 1}, "is encrypted"),
        ({"method": 14}, "is packed by method 14"),
        ({"size": 2**31}, "is too large"),
        ({"packed": 2000}, "overlap"),
        ({"offset": 70}, "is damaged, twice|overlap"),
        ({"crc": 1}, "is damaged, twice"),
        ({"size": 1}, "is damaged, twice"),
    ],
)
def test_zips_that_lie_of_their_members(fields, reason, tmp_path):
    opened = io.BytesIO(patched(make_zip(nih_members()), **fields))
    with pytest.raises(archives.ArchiveError, match=reason):
        archives.unpack(archives.read_plan(opened, tmp_path / "out", "the zip"))
    assert not (tmp_path / "out" / "Data_Entry_2017.csv").exists()


def test_many_bytes_in_a_small_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    with pytest.raises(archives.ArchiveError, match=r"would unpack to 1,200 bytes"):
        archives.read_plan(
            io.BytesIO(make_zip({f"{i}.csv": b"0" * 300 for i in range(4)})), tmp_path, "the zip"
        )
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with pytest.raises(archives.ArchiveError, match=r"claims 4 members"):
        archives.read_plan(
            io.BytesIO(make_zip({f"{i}.csv": b"0" for i in range(4)})), tmp_path, "the zip"
        )


def test_zips_with_any_byte_damaged_are_read_rightly_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    content, members = make_zip(nih_members()), nih_members()
    refused = 0
    for place in rng.permutation(len(content))[:200]:
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            archives.unpack(archives.read_plan(io.BytesIO(damaged), tmp_path / "out", "the zip"))
        except DownloadError:
            refused += 1
        there = visible(tmp_path / "out") if (tmp_path / "out").exists() else {}
        by_content = sorted(members.values())
        assert all(found in by_content for found in there.values()), (
            place
        )  # a damaged name is a name
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 150


def test_tars_with_any_byte_damaged_are_read_rightly_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    make_tar(tmp_path / "good.tar.gz", {"images/a.png": png(0), "images/b.png": png(1)})
    content = gzip.decompress((tmp_path / "good.tar.gz").read_bytes())
    used = len(content.rstrip(b"\0"))
    refused = 0
    for place in rng.integers(0, used, 150):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "images_001.tar.gz").write_bytes(gzip.compress(damaged, 1))
        try:
            archives.unpack_tar(tmp_path / "images_001.tar.gz", tmp_path / "out" / "images_001")
        except DownloadError:
            refused += 1
            assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 25


def test_zips_of_more_than_four_gigabytes_have_another_form(tmp_path):
    """Zip64, which Kaggle's archive of 45 GB must be: the same form in a small one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in nih_members().items():
            with archive.open(name, "w", force_zip64=True) as handle:
                handle.write(content)
    archives.unpack(archives.read_plan(buffer, tmp_path, "the zip"))
    assert visible(tmp_path) == nih_members()


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"<html>sign in</html>", make_zip({"a": b"b" * 99})[:-30]]
)
def test_what_is_no_zip(content, kaggle, tmp_path):
    kaggle.files["/nih-chest-xrays/data"] = content
    with pytest.raises(
        DownloadError,
        match=r"nih-chest-xrays/data is not a whole zip archive" if content else r"\(416\)",
    ):
        download.obtain("kaggle", tmp_path / "raw" / "kaggle")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_in_the_folder_carries_nothing_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images_001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DownloadError, match="is a link out of"):
        archives.unpack(
            archives.read_plan(io.BytesIO(make_zip(nih_members())), tmp_path / "out", "the zip")
        )
    (tmp_path / "out" / "images_001").unlink()
    (tmp_path / "target.csv").write_text("mine")
    (tmp_path / "out" / "BBox_List_2017.csv").symlink_to(tmp_path / "target.csv")
    with pytest.raises(DownloadError, match="is not a file"):
        archives.unpack(
            archives.read_plan(io.BytesIO(make_zip(nih_members())), tmp_path / "out", "the zip")
        )
    assert (tmp_path / "target.csv").read_text() == "mine"
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --------------------------------------------------------------------------------------------------


def make_tar(path, members, end=True):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)


def nih_box(folder, n=12):
    """What NIH hands out: archives with one folder `images`, and the tables beside them."""
    folder.mkdir()
    for k in range(n):
        names = [f"{k + 1:08d}_{i:03d}.png" for i in range(2)]
        make_tar(
            folder / f"images_{k + 1:03d}.tar.gz",
            {f"images/{name}": png(2 * k + i) for i, name in enumerate(names)},
        )
    rows = "".join(
        f"{k + 1:08d}_{i:03d}.png,Mass,{i},{k + 1},057Y,M,PA\n" for k in range(n) for i in range(2)
    )
    (folder / "Data_Entry_2017_v2020.csv").write_text(TABLE.splitlines()[0] + "\n" + rows)
    (folder / "test_list.txt").write_text("00000001_000.png\n")
    (folder / "README.pdf").write_bytes(b"x")
    return folder


def test_nih_archives_are_unpacked_beside_their_table(tmp_path):
    box = nih_box(tmp_path / "box")
    shown = data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    assert shown["images"] == 24
    assert shown["csv"] == "Data_Entry_2017_v2020.csv"
    assert shown["origin"] == "NIH's own files, 12 archives unpacked"
    (store,) = (tmp_path / "raw").glob("nih-*")
    files = visible(store)
    assert files["images_012/images/00000012_001.png"] == png(23)
    assert set(files) >= {"Data_Entry_2017_v2020.csv", "test_list.txt"}
    assert len(files) == 26
    assert len(list(box.glob("*.tar.gz"))) == 12, "they are the user's"
    with pytest.warns(
        UserWarning, match=r"not ChestX-ray14 as published: images: 24, published 112,120"
    ):
        manifest = data.preprocess(tmp_path / "raw" / "box", tmp_path / "out")
    assert (manifest["images"], manifest["patients"], manifest["images_without_csv_row"]) == (
        24,
        12,
        0,
    )
    changed = (store / "images_001").stat().st_mtime_ns
    assert data.fetch(f"nih:{box}", tmp_path / "raw" / "box-paper") == shown
    assert [*(tmp_path / "raw").glob("nih-*")] == [store]
    assert (store / "images_001").stat().st_mtime_ns == changed, "unpacked twice"


@pytest.mark.parametrize("with_archives", [False, True])
def test_nih_files_that_are_unpacked_are_used_where_they_lie(with_archives, tmp_path):
    box = nih_box(tmp_path / "box", 2)
    for path in sorted(box.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            tar.extractall(box, filter="data")
        if not with_archives:
            path.unlink()
    shown = data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    assert shown["images"] == 4
    assert [*visible(tmp_path / "raw")] == [], "nothing is copied"


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("fault", ["gone", "short"])
def test_a_folder_that_was_unpacked_in_part_is_finished_elsewhere(
    fault, links, tmp_path, monkeypatch
):
    """The first image of an archive says nothing of the last: a tar that was stopped leaves the
    last one short and the rest away.
    """
    box = nih_box(tmp_path / "box", 12)
    for path in sorted(box.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            tar.extractall(box, filter="data")
    broken = box / "images" / "00000007_001.png"
    broken.unlink() if fault == "gone" else broken.write_bytes(broken.read_bytes()[:-1])
    if not links:
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "Cross-device link"))
        )
    before = visible(box)
    with pytest.warns(
        UserWarning,
        match=r"images_007.tar.gz is unpacked in part only: 1 of its 2 files .*00000007_001.png",
    ):
        shown = data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    assert shown["images"] == 24
    (store,) = (tmp_path / "raw").glob("nih-*")
    files = visible(store)
    assert files["images_007/images/00000007_001.png"] == png(13)
    assert len([name for name in files if name.endswith(".png")]) == 24
    shared = (store / "images_001" / "images" / "00000001_000.png").samefile(
        box / "images" / "00000001_000.png"
    )
    assert shared is links, "no second copy of what is there, where the disk can"
    assert visible(box) == before, "the folder is the user's"
    assert "unpacked before" in shown["verified"]


def test_archives_are_listed_once(tmp_path, monkeypatch):
    box = nih_box(tmp_path / "box", 2)
    for path in sorted(box.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            tar.extractall(box, filter="data")
    first = data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    assert first["verified"] == "name and length of each file in 2 archives"
    monkeypatch.setattr(
        archives, "list_tar", lambda path: pytest.fail(f"{path.name} is read again")
    )
    assert data.fetch(f"nih:{box}", tmp_path / "raw" / "box") == first


def test_two_downloads_at_once(kaggle, tmp_path, monkeypatch):
    """While one process fills the folder, another ends with one line; the first is not disturbed,
    and its folder is then used.
    """
    monkeypatch.setattr(paths, "_PATIENCE", 0.1)
    store = tmp_path / "raw" / "nih-chest-xrays-data"
    with paths.alone(store):
        with pytest.raises(
            paths.BusyError, match=r"at work in .*nih-chest-xrays-data: wait until it is done"
        ):
            download.obtain("kaggle", tmp_path / "raw" / "kaggle")
        assert not visible(store)
    note = download.obtain("kaggle", tmp_path / "raw" / "kaggle")
    with paths.alone(store):  # who only uses what is finished needs no lock
        assert download.obtain("kaggle", tmp_path / "raw" / "kaggle") == note


UNPACKER = """
import pathlib, sys
from lib.data import sources as download
try:
    print(download.obtain(sys.argv[1], pathlib.Path(sys.argv[2]))["images"])
except (download.DownloadError, OSError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_two_processes_that_unpack_into_one_folder(tmp_path):
    box = nih_box(tmp_path / "box", 12)
    command = [sys.executable, "-c", UNPACKER, f"nih:{box}", str(tmp_path / "raw" / "box")]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=paths.ROOT
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["24", "24"], (
        "the second waits for what takes a moment"
    )
    (store,) = (tmp_path / "raw").glob("nih-*")
    assert len(visible(store)) == 26
    shutil.rmtree(store)
    with paths.alone(store):
        (line,) = subprocess.run(
            command, capture_output=True, text=True, cwd=paths.ROOT, check=True, timeout=60
        ).stdout.splitlines()
        assert line.startswith(
            f"BusyError: another process is at work in (outside the project)/{store.name}: wait until it is done"
        )
        assert not visible(store)


def test_some_of_nihs_archives(tmp_path):
    box = nih_box(tmp_path / "box", 3)
    with pytest.warns(UserWarning, match="3 of NIH's 12 archives are in"):
        assert data.fetch(f"nih:{box}", tmp_path / "raw" / "box")["images"] == 6


def tar_member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (tar_member("../evil.txt"), "leads out of the folder"),
        (tar_member("/evil.txt"), "has an absolute name"),
        (tar_member("images/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (
            tar_member("images/hard", type=tarfile.LNKTYPE, linkname="images/00000001_000.png"),
            "is a link",
        ),
        (tar_member("images/pipe", type=tarfile.FIFOTYPE), "is neither a file nor a folder"),
        (tar_member("images/dev", type=tarfile.CHRTYPE), "is neither a file nor a folder"),
        (tar_member("images/00000001_000.png"), "is there twice"),
    ],
)
def test_hostile_tars_leave_nothing(bad, reason, tmp_path):
    box = nih_box(tmp_path / "box", 2)
    make_tar(
        box / "images_002.tar.gz",
        {"./images/00000001_000.png": png(0), bad: b"evil" if bad.isreg() else None},
    )
    with pytest.raises(
        DownloadError,
        match=rf"images_002.tar.gz is refused: its member .* {reason}; nothing of it was unpacked",
    ):
        data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    (store,) = (tmp_path / "raw").iterdir()
    assert [path.name for path in store.iterdir()] == ["images_001"]


def test_a_tar_cut_at_any_byte_leaves_nothing(tmp_path):
    make_tar(tmp_path / "images_001.tar.gz", {"images/a.png": png(0), "images/b.png": png(1)})
    content = (tmp_path / "images_001.tar.gz").read_bytes()
    for cut in range(0, len(content), 2):
        (tmp_path / "images_001.tar.gz").write_bytes(content[:cut])
        with pytest.raises(
            DownloadError,
            match=r"images_001.tar.gz (is damaged or cut off \(.*\): download it again|holds no files)",
        ):
            archives.unpack_tar(tmp_path / "images_001.tar.gz", tmp_path / "out" / "images_001")
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    (tmp_path / "images_001.tar.gz").write_bytes(content)
    assert archives.unpack_tar(tmp_path / "images_001.tar.gz", tmp_path / "out" / "images_001") == 2


def test_nih_without_its_table_or_images(tmp_path):
    box = nih_box(tmp_path / "box", 1)
    table = box / "Data_Entry_2017_v2020.csv"
    table.rename(box / "other.csv")
    with pytest.raises(
        ValueError,
        match=r"there is no Data_Entry_2017\*\.csv in .*box: download it from https://nihcc.app.box.com",
    ):
        data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    (box / "other.csv").rename(table)
    (box / "images_001.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"holds neither images nor images_001\.tar\.gz"):
        data.fetch(f"nih:{box}", tmp_path / "raw" / "box")
    with pytest.raises(ValueError, match=r"is not a folder: give the one with images_001\.tar\.gz"):
        data.fetch(f"nih:{table}", tmp_path / "raw" / "box")
    assert not visible(tmp_path / "raw")


# --------------------------------------------------------------------------------------------------


def medmnist(path, n=(7, 2, 3), **changed):
    """A file as MedMNIST writes it, small."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in zip(chestmnist.PARTS, n, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 64, 64), dtype=np.uint8)
        arrays[f"{part}_labels"] = (rng.random((count, 14)) < 0.2).astype(np.uint8)
    arrays["train_labels"][0] = 0
    arrays["train_labels"][1] = np.arange(14) % 13 == 0  # the first and the last column
    arrays = {name: array for name, array in (arrays | changed).items() if array is not None}
    with open(path, "wb") as handle:
        np.savez_compressed(handle, **arrays)
    return arrays


@pytest.fixture
def published(tmp_path, server, waits, monkeypatch):
    """A small file in the place of the published one."""
    arrays = medmnist(tmp_path / "published.npz")
    content = (tmp_path / "published.npz").read_bytes()
    server.files["/records/10519652/files/chestmnist_64.npz"] = content
    monkeypatch.setattr(
        chestmnist, "URL", f"{server.url}/records/10519652/files/chestmnist_64.npz?download=1"
    )
    monkeypatch.setattr(chestmnist, "BYTES", len(content))
    monkeypatch.setattr(chestmnist, "MD5", hashlib.md5(content).hexdigest())
    return arrays


def test_what_is_published():
    assert (
        chestmnist.URL == "https://zenodo.org/records/10519652/files/chestmnist_64.npz?download=1"
    )
    assert chestmnist.request().url == chestmnist.URL
    assert chestmnist.BYTES == 401_604_127
    assert chestmnist.MD5 == "9de6cd0b934ebb5b7426cfba5efbae16"
    assert sorted(chestmnist.LABELS) == sorted(data.FINDINGS)


def test_chestmnist_goes_through_to_the_three_files(published, server, tmp_path):
    raw = tmp_path / "raw" / "chestmnist"
    server.cut_once = 5000
    shown = data.fetch("chestmnist", raw)
    assert shown["kind"] == "chestmnist"
    assert shown["images"] == 12
    assert shown["csv"] is None
    assert shown["origin"] == "chestmnist_64.npz, Zenodo record 10519652"
    assert "CC BY 4.0" in shown["attribution"]
    assert "NIH Clinical Center" in shown["attribution"]
    assert "Not for clinical use" in shown["attribution"]
    server.log.clear()
    assert data.fetch("chestmnist", tmp_path / "raw" / "chestmnist-paper") == shown
    assert server.log == []

    manifest = data.preprocess(raw, tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    assert np.array_equal(
        images, np.concatenate([published[f"{part}_images"] for part in ("train", "val", "test")])
    )
    assert images.dtype == np.uint8
    labels = np.concatenate([published[f"{part}_labels"] for part in ("train", "val", "test")])
    order = [chestmnist.LABELS.index(name) for name in data.FINDINGS]
    assert np.array_equal(data.finding_matrix(metadata["findings"]), labels[:, order].astype(bool))
    assert metadata["findings"][0] == "No Finding"
    assert metadata["findings"][1] == "Atelectasis|Hernia"
    assert metadata["split"].tolist() == ["train"] * 9 + ["test"] * 3
    assert metadata["image_id"].tolist()[6:10] == [
        "train_000006",
        "val_000000",
        "val_000001",
        "test_000000",
    ]
    for name in chestmnist.UNKNOWN:
        assert metadata[name].isna().all() if name == "age" else (metadata[name] == "").all()
    assert set(manifest["unknown"]) == {"patient_id", "view_position", "age", "sex"}
    assert manifest["patients"] is None
    assert manifest["split"]["train"] == 9
    assert manifest["split"]["of_these_val"] == 2
    assert "val joins train; not NIH's lists" in manifest["split"]["method"]
    assert manifest["source"]["published"] is True
    before = (tmp_path / "out" / "images.npy").stat().st_mtime_ns
    assert data.preprocess(raw, tmp_path / "out") == manifest
    assert (tmp_path / "out" / "images.npy").stat().st_mtime_ns == before
    (tmp_path / "out" / "metadata.csv").unlink()
    assert data.preprocess(raw, tmp_path / "out") == manifest


def test_chestmnist_as_a_file(tmp_path, monkeypatch):
    medmnist(tmp_path / "mine.npz")
    shown = data.fetch(f"chestmnist:{tmp_path / 'mine.npz'}", tmp_path / "raw")
    assert shown["origin"] == "mine.npz, not the published file"
    assert str(tmp_path) not in json.dumps(shown)
    with pytest.warns(UserWarning, match="mine.npz is not the published file"):
        assert data.preprocess(tmp_path / "raw", tmp_path / "out")["source"]["published"] is False
    with pytest.raises(ValueError, match="has 64x64 pixels and cannot give size=32"):
        data.preprocess(tmp_path / "raw", tmp_path / "other", size=32)


def test_chestmnist_is_not_taken_into_memory(tmp_path):
    import tracemalloc

    n = 6000  # 25 MB of pixels
    medmnist(
        tmp_path / "big.npz",
        train_images=np.zeros((n, 64, 64), np.uint8),
        train_labels=np.zeros((n, 14), np.uint8),
    )
    tracemalloc.start()
    with pytest.warns(UserWarning, match="not the published"):
        chestmnist.preprocess(tmp_path / "big.npz", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14e6


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"val_labels": None}, "it holds .* and not"),
        ({"extra": np.zeros(2)}, "it holds .* and not"),
        (
            {"train_images": np.zeros((7, 28, 28), np.uint8)},
            r"train_images is \(7, 28, 28\) and not \(n, 64, 64\)",
        ),
        ({"train_images": np.zeros((7, 64, 64, 3), np.uint8)}, r"train_images is \(7, 64, 64, 3\)"),
        (
            {"train_images": np.zeros((7, 64, 64), np.float32)},
            "train_images is float32 and not uint8",
        ),
        (
            {"train_images": np.asfortranarray(np.zeros((7, 64, 64), np.uint8))},
            "stored column by column",
        ),
        (
            {"test_labels": np.zeros((4, 14), np.uint8)},
            r"test_labels is \(4, 14\) and not \(3, 14\)",
        ),
        ({"test_labels": np.zeros((3, 15), np.uint8)}, r"test_labels is \(3, 15\)"),
        (
            {"test_labels": np.full((3, 14), 2, np.uint8)},
            "test_labels holds 2, and not only 0 and 1",
        ),
        ({"test_labels": np.full((3, 14), 0.5)}, "test_labels is float64 and not of whole numbers"),
        (
            {"test_labels": np.array([[Boom()] * 14] * 3, object)},
            "Object arrays|object and not of whole numbers",
        ),
        (
            {
                "train_images": np.zeros((0, 64, 64), np.uint8),
                "train_labels": np.zeros((0, 14), np.uint8),
            },
            "is empty",
        ),
    ],
)
def test_files_that_are_no_chestmnist(changed, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    medmnist(tmp_path / "x.npz", **changed)
    with pytest.raises(
        ValueError,
        match=rf"x.npz is not ChestMNIST at 64x64 \(.*({reason}).*\); give chestmnist_64.npz from https://zenodo",
    ):
        data.fetch(f"chestmnist:{tmp_path / 'x.npz'}", tmp_path / "raw")
    assert not visible(tmp_path / "raw")
    assert not (tmp_path / "unpickled").exists()


def test_damaged_chestmnist_files(tmp_path):
    arrays = medmnist(tmp_path / "x.npz")
    pixels = np.concatenate([arrays[f"{part}_images"] for part in chestmnist.PARTS])
    content = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(ValueError, match="there is no file"):
        data.fetch(f"chestmnist:{tmp_path / 'none.npz'}", tmp_path / "raw")
    rng = np.random.default_rng(0)
    outcomes = []
    for place in (*range(0, len(content), len(content) // 60), None):
        damaged = bytearray(content if place is not None else content[: len(content) // 2])
        if place is not None:
            damaged[place] ^= rng.integers(1, 256)
        (tmp_path / "x.npz").write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not the published one
                data.fetch(f"chestmnist:{tmp_path / 'x.npz'}", tmp_path / "raw")
                data.preprocess(tmp_path / "raw", tmp_path / "out", resume=False)
            outcome = "read"  # a byte that says nothing, such as one of a date
        except ValueError as error:
            outcome = str(error)
        outcomes.append(outcome)
        if outcome == "read":
            assert np.array_equal(data.load_images(tmp_path / "out"), pixels)
    assert all(
        re.search(
            r"^\S+x.npz (is not ChestMNIST at 64x64|is damaged) \(.*\)[:;] .*$|^read$", outcome
        )
        for outcome in outcomes
    ), outcomes
    assert outcomes.count("read") < len(outcomes) / 4


def test_evaluation_says_that_patients_are_unknown():
    from lib.study import evaluate

    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "patient_id": "",
            "findings": ["Mass", "Effusion"] * 20,
            "split": ["train"] * 30 + ["test"] * 10,
        }
    )
    features = rng.standard_normal((40, 4))
    with pytest.warns(UserWarning, match="no patient id: intervals are over images"):
        numbers = evaluate.evaluate_features(
            features, features, np.arange(40) % 2, table, n_boot=20
        )
    assert (
        numbers["label_combinations"]["low"]
        <= numbers["label_combinations"]["accuracy"]
        <= numbers["label_combinations"]["high"]
    )
