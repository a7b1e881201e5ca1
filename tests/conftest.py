"""Fixtures that several files of tests share."""

import itertools
import os
import shutil
from contextlib import contextmanager

import pytest
import torch

from tests.server import Server

torch.backends.cudnn.allow_tf32 = False  # else a GPU's convolutions have ten bits
os.environ.pop("CXR_CALLED_FROM", None)  # run_all.sh sets it: a test's folder is its own
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is read, if it is there
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")


@pytest.fixture(scope="module")  # longer, and its event loop would disturb other modules
def browser():
    """Chromium without a window, driven by Playwright; CHROMIUM names one off the path."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on the path (CHROMIUM names one elsewhere)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def server():
    """A server on this machine, for downloads."""
    started = Server()
    yield started
    started.close()


@pytest.fixture
def dies_at(monkeypatch):
    """A context in which a process is interrupted where it would move its k-th file into place."""

    @contextmanager
    def context(k):
        calls, replace = itertools.count(), os.replace

        def dying(source, target):
            if next(calls) == k:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying)
            yield

    return context
