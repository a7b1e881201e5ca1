"""Places and names, and the writer through which every file goes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from lib import paths


def test_folders_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "d"))
    monkeypatch.setenv("CXR_FIGURES_DIR", str(tmp_path / "f"))
    assert paths.run_dir("x", "p4m", 3) == tmp_path / "d" / "runs" / "x" / "p4m" / "seed3"
    assert paths.dataset_dir("x") == tmp_path / "d" / "x"
    assert paths.raw_dir("x") == tmp_path / "d" / "raw" / "x"
    assert paths.figures_dir("x") == tmp_path / "f" / "x"
    monkeypatch.delenv("CXR_DATA_DIR")
    assert paths.data_root() == paths.ROOT / "data"


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", ".hidden", "with space", "x" * 65, "é"])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a dataset"):
        paths.dataset_dir(name)


def test_shown_paths_name_no_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "somewhere"))
    assert paths.show(tmp_path / "somewhere" / "x" / "images.npy") == "data/x/images.npy"
    assert paths.show(paths.ROOT / "README.md") == "README.md"
    assert paths.show(tmp_path / "secret" / "x-rays") == "(outside the project)/x-rays"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with paths.atomic_write(path, "w") as handle:
        handle.write("first\n")
        assert not path.exists()
    with pytest.raises(ValueError, match="Object arrays"):  # behind the head of the file
        paths.save_npy(path, np.array([{}]))
    assert path.read_bytes() == b"first\n"
    assert os.listdir(path.parent) == ["file.txt"]


def test_json_round_trip_and_what_json_has_not(tmp_path):
    path = tmp_path / "x.json"
    value = {"a": np.float32(0.5), "n": np.nan, "b": [np.int64(2), (np.True_,)]}
    paths.save_json(path, value | {3: np.arange(2), "s": "ß", "i": [-np.inf]})
    assert paths.load_json(path) == {
        **{"a": 0.5, "n": None, "b": [2, [True]], "3": [0, 1], "s": "ß", "i": [None]}
    }
    assert "ß" in path.read_text(encoding="utf-8")
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"x\.json is not a JSON file .* delete it"):
        paths.load_json(path)


HOLDER = """
import sys, time
from lib import paths
with paths.alone(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_is_at_work_and_a_killed_one_blocks_nobody(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(paths, "_PATIENCE", 0.1)
    folder = tmp_path / "store"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=paths.ROOT) as holder:
        try:
            assert holder.stdout.readline().strip() == b"in"
            with pytest.raises(paths.BusyError, match="store") as caught:
                with paths.alone(folder):
                    pytest.fail("two at once")
            assert "\n" not in str(caught.value)
        finally:
            holder.kill()
    for _ in range(2):
        with paths.alone(folder):
            with pytest.raises(paths.BusyError):  # another thread, or the same one by mistake
                with paths.alone(folder):
                    pytest.fail("two at once")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not write .*inner: .*CXR_DATA_DIR"):
        with paths.alone(tmp_path / "file" / "inner"):
            pytest.fail("no such folder")


def test_a_file_in_use_is_named_and_stays(tmp_path, monkeypatch):
    """As Windows does it: no file that is open is replaced."""
    paths.save_json(tmp_path / "a.json", 1)

    def refuse(*_):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"a\.json: .*notebook") as caught:
        paths.save_json(tmp_path / "a.json", 2)
    assert caught.value.errno == 13
    assert paths.load_json(tmp_path / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
