"""Runs the commands of README, CONTRIBUTING and FAQ, as a reader would, in a fresh clone of what is
committed.

    python tests/readme_commands.py [--python PYTHON] [--only WORD] [--folder FOLDER]

`COMMANDS` has every command that the three pages show. Those that are run stand with what is run
for them: the command itself, or a smaller one of the same form where the page's own takes hours or
names a folder of the reader's. All others stand with the reason. Without ``--python`` the first
call makes ``.venv`` in the clone, as a reader's does; with it, that Python is used, must have the
packages, and no network is needed. tests/test_readme.py holds this list to the pages."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "FAQ.md")
STARTS = r"(?:\./run_all\.sh|\.venv/bin/|python |pip |conda |torchrun |srun |git |PYTHON=|%)"


@dataclass(frozen=True)
class Run:
    """What is run for a command, in the clone. ``PYTHON`` is the Python that has the packages."""

    command: str


@dataclass(frozen=True)
class Elsewhere:
    """Why the command is not run by this script, or which test runs it."""

    reason: str


SMOKE = "./run_all.sh --preset smoke"
OWN = "./run_all.sh --preset smoke --data data/raw/phantom-smoke --fit pad"
CLOUD = Elsewhere(
    "Colab's; tests/test_bootstrap.py runs the first cell and a notebook by %run as Colab would"
)
BENCH = "a benchmark of some minutes; CONTRIBUTING asks for it where speed is claimed"
COMMANDS: dict[str, Run | Elsewhere] = {
    "git clone https://github.com/OWNER/equivariant-cxr-clustering && cd equivariant-cxr-clustering": Elsewhere(
        "this script starts with a clone of this repository instead"
    ),
    "./run_all.sh": Run(SMOKE),  # the same notebooks; the quick preset takes nine minutes
    "./run_all.sh --data PATH": Run(OWN),
    "./run_all.sh --data PATH --reuse phantom/p4m/seed0": Run(
        f"{OWN} --reuse phantom-smoke/p4m/seed0".replace(" --preset smoke", "")
    ),
    "python -m lib.explore.reuse --reuse RUN --export DIR": Run(
        "PYTHON -m lib.explore.reuse --reuse phantom-smoke/p4m/seed0 --export exported"
    ),
    "./run_all.sh --study --preset study --data PATH": Run(
        "./run_all.sh --study --preset smoke --data data/raw/phantom-smoke --arms alexnet,p4m --seeds 0"
    ),
    "python -m lib.run": Run("PYTHON -m lib.run --preset smoke"),
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    "-m lib.train config.json data/phantom-paper RUN_DIR": Run(
        "PYTHON -m torch.distributed.run --nnodes 1 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 -m lib.train "
        "data/runs/phantom-smoke/p4m/seed0/settings.json data/phantom-smoke data/runs/two"
    ),
    "./run_all.sh --test tests/test_gconv.py -k equivariant": Run(
        "./run_all.sh --test tests/test_gconv.py -k equivariant"
    ),
    "./run_all.sh --test": Elsewhere("it is what continuous integration runs"),
    "./run_all.sh --data chestmnist": Elsewhere(
        "downloads 0.4 GB; tests/test_download.py reads such a file from a server of its own"
    ),
    "./run_all.sh --preset paper --nproc 8": Elsewhere(
        "wants eight GPUs; tests/test_distributed.py trains with two processes"
    ),
    ".venv/bin/jupyter lab": Elsewhere(
        "tests/test_jupyterlab.py starts it and runs notebooks in a browser"
    ),
    "conda env create -f environment.yml": Elsewhere(
        "wants conda; tests/test_environment.py holds the file to pyproject.toml"
    ),
    "pip install -e .[dicom]": Elsewhere(
        "wants a network; tests/test_environment.py knows the extra"
    ),
    "pip install pre-commit && pre-commit install": Elsewhere(
        "wants a network and changes the repository's hooks"
    ),
    "srun --nodes 2 ...": Elsewhere("wants a cluster with Slurm"),
    "PYTHON=/path/to/python3.12 ./run_all.sh": Elsewhere(
        "with --python all commands here are run so"
    ),
    "python tests/bench/paper_scale.py": Elsewhere(BENCH),
    "python tests/bench/kmeans.py": Elsewhere(BENCH),
    "python tests/bench/gconv.py": Elsewhere(BENCH),
    "%cd companion/notebooks": CLOUD,
    "%run 00_download.ipynb": CLOUD,
    "%run 01_preprocess.ipynb": CLOUD,
}


def shown(text: str) -> list[str]:
    """Commands that a page shows: in indented or fenced blocks of shell, and in the text between
    backticks.
    """
    text = re.sub(r"^```python\n.*?^```\n", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(
        r"^(?: {4,}|(?!`))([^`\n]+)$",
        "\n".join(re.findall(r"^ {4,}\S.*$", text, re.MULTILINE)),
        re.MULTILINE,
    )
    lines += [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    lines += [
        " ".join(span.split())
        for span in re.findall(r"`([^`]+)`", re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE))
    ]
    found = [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]
    found = ["srun --nodes 2 ..." if line.startswith("srun ") else line for line in found]
    return list(dict.fromkeys(line for line in found if re.match(STARTS, line)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="use this Python instead of making .venv")
    parser.add_argument(
        "--only",
        default="",
        help="run the commands that contain this word; those before it may be needed",
    )
    parser.add_argument("--folder", help="where to put the clone (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cxr-readme-", ignore_cleanup_errors=True) as temporary:
        clone = Path(given.folder or temporary, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CXR_")
        }
        environment |= {"PYTHONPATH": str(clone)} | (
            {"PYTHON": os.path.abspath(given.python)} if given.python else {}
        )
        python = environment.get("PYTHON", str(clone / ".venv" / "bin" / "python"))
        failed = []
        for text, how in COMMANDS.items():
            if not isinstance(how, Run) or given.only not in text:
                continue
            if "settings.json" in how.command:
                write_settings(clone / "data/runs/phantom-smoke/p4m/seed0", python, clone)
            command = re.sub(r"^PYTHON\b", python.replace("\\", r"\\"), how.command)
            print(f"== {text}\n   {how.command}", flush=True)
            begin = time.monotonic()
            done = subprocess.run(
                command,
                shell=True,
                cwd=clone,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            print(f"   status {done.returncode}, {time.monotonic() - begin:.0f} s", flush=True)
            if done.returncode:
                failed.append(text)
                print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), flush=True)
    total = sum(isinstance(how, Run) for how in COMMANDS.values())
    print(
        f"{len(failed)} failed, {total} are run, {len(COMMANDS) - total} are not, each with its reason"
    )
    return int(bool(failed))


def write_settings(run_dir: Path, python: str, clone: Path) -> None:
    """The settings of a finished run alone, as ``lib.train`` wants them."""
    code = (
        "import json, sys; from dataclasses import fields; from lib.runs import TrainConfig; "
        "stored = json.load(open(sys.argv[1] + '/config.json', encoding='utf-8')); "
        "names = [f.name for f in fields(TrainConfig)]; "
        "json.dump({n: stored[n] for n in names if n in stored}, open(sys.argv[1] + '/settings.json', 'w', encoding='utf-8'))"
    )
    subprocess.run([python, "-c", code, str(run_dir)], cwd=clone, check=True)


if __name__ == "__main__":
    sys.exit(main())
