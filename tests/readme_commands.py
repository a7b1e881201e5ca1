"""Runs the commands of the pages, as a reader would, in a fresh clone of what is committed.

    python tests/readme_commands.py [--python PYTHON]

`COMMANDS` has every command that `PAGES` show: with the text that is run for it, which is smaller
if the page's own takes hours or names a folder of the reader's, or with the reason why it is not
run. Left out are benchmarks, which take minutes, and what is not of this project: pip, uv, conda,
srun. With ``--python`` that Python is used, must have the packages, and no network is needed.
tests/test_readme.py compares list and pages."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = r"(?:\./run_all\.sh|\.venv/bin/|python (?!tests/bench/)|torchrun |git |PYTHON=|%)"
SMOKE = "./run_all.sh --preset smoke"
OWN = "--data data/raw/phantom-smoke"
RUNS, P4M = "data/runs/phantom-smoke", "phantom-smoke/p4m/seed0"
REDRAW = "./run_all.sh --study --redraw --dataset nih-9k"
CHOSEN = "./run_all.sh --test tests/test_gconv.py -k equivariant"
TORCHRUN = "PYTHON -m torch.distributed.run --nnodes 1 --nproc-per-node 2 --standalone -m lib train"
STUDY = f"./run_all.sh --study --preset smoke {OWN} --arms alexnet,p4m --seeds 0"
NOT = "not run: "
CLOUD = NOT + "tests/test_bootstrap.py runs the first cell and a notebook by %run as Colab would"
COMMANDS: dict[str, str] = {
    "git clone https://github.com/OWNER/equivariant-cxr-clustering "
    "&& cd equivariant-cxr-clustering": NOT + "this script clones this repository instead",
    "./run_all.sh": SMOKE,
    "./run_all.sh --data PATH": f"{SMOKE} {OWN} --fit pad",
    "./run_all.sh --data PATH --reuse phantom/p4m/seed0": f"./run_all.sh {OWN} --reuse {P4M}",
    "python -m lib reuse RUN --export DIR": f"PYTHON -m lib reuse {P4M} --export exported",
    "./run_all.sh --data embeddings.npz": NOT + "tests/test_embeddings.py makes a file and does",
    "python -m lib train --images data/NAME/images.npy --config given.json --labels clusters.csv "
    "--run-dir RUN_DIR": NOT + "tests/test_main.py trains both backbones so",
    REDRAW: REDRAW,
    "./run_all.sh --study --preset xrays --data PATH/nih-9k --dataset nih-9k --jobs 2": (
        NOT + "hours, and the X-rays"
    ),
    "./run_all.sh --preset paper --data kaggle": NOT + "a GPU and 45 GB",
    "./run_all.sh --study --arms published": STUDY + " --status",
    "./run_all.sh --study": STUDY,
    "./run_all.sh --help": "./run_all.sh --help",
    "python -m lib run": "PYTHON -m lib run --preset smoke",
    "torchrun --nnodes 2": (
        f"{TORCHRUN} --config {RUNS}/settings.json --images data/phantom-smoke/images.npy "
        "--run-dir data/runs/two"
    ),
    CHOSEN: CHOSEN,
    "./run_all.sh --test": NOT + "it is what continuous integration runs",
    "python -m pytest": NOT + "it is a part of ./run_all.sh --test",
    "./run_all.sh --data chestmnist": NOT + "0.4 GB; tests/test_sources.py has its own server",
    "./run_all.sh --preset paper --nproc 8": (
        NOT + "wants eight GPUs; tests/test_parallel.py trains with two processes"
    ),
    ".venv/bin/jupyter lab": NOT + "tests/test_jupyterlab.py runs notebooks in a browser",
    "git grep -lz OWNER/equivariant | xargs -0 sed -i 's#OWNER/equivariant#YOU/equivariant#'": (
        NOT + "changes every page"
    ),
    "PYTHON=/path/to/python3.12 ./run_all.sh": NOT + "with --python all commands are run so",
    "%cd companion/notebooks": CLOUD,
    "%run 00_download.ipynb": CLOUD,
    "%run 01_preprocess.ipynb": CLOUD,
}


def shown(text: str) -> list[str]:
    """Commands that a page shows, in indented blocks and in the text between backticks."""
    text = re.sub(r"^```python\n.*?^```\n", "", text, flags=re.MULTILINE | re.DOTALL)
    block = r"^ {4,}\S.*$"
    joined = re.sub(r" *\\\n *", " ", text)
    lines = [line.strip() for line in re.findall(block, joined, re.MULTILINE) if "`" not in line]
    prose = re.sub(block, "", text, flags=re.MULTILINE)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]
    found = [re.sub(r"^(torchrun \S+ \S+).*", r"\1", line) for line in found]
    return list(dict.fromkeys(line for line in found if re.match(STARTS, line)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="use this Python instead of making .venv")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cxr-readme-", ignore_cleanup_errors=True) as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CXR_")}
        python = os.path.abspath(given.python) if given.python else f"{clone}/.venv/bin/python"
        clean |= {"PYTHONPATH": str(clone)} | ({"PYTHON": python} if given.python else {})
        failed = []
        for text, command in COMMANDS.items():
            if command.startswith(NOT):
                continue
            if "settings.json" in command:  # the settings of a finished run alone
                code = "import sys; from dataclasses import asdict; from lib import paths, runs; "
                code += "config = runs.load_run(sys.argv[1] + '/p4m/seed0').config; "
                code += "paths.save_json(sys.argv[1] + '/settings.json', asdict(config))"
                subprocess.run([python, "-c", code, RUNS], cwd=clone, check=True)
            command = re.sub(r"^PYTHON\b", python.replace("\\", r"\\"), command)
            print(f"== {text}\n   {command}", flush=True)
            options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
            done = subprocess.run(command, shell=True, cwd=clone, env=clean, **options)
            if done.returncode:
                failed.append(text)
                print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), flush=True)
    print(f"{len(failed)} failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
