"""Does the loop find classes that are there? Draws figures/digits from finished runs.

    ./run_all.sh --study --data digits --arms ARMS --seeds 0,1,2,3,4 --no-claims
    ./run_all.sh --study --data digits-turned --arms ARMS --seeds 0,1,2,3,4 --no-claims
    python tests/bench/digits.py

ARMS are alexnet-plain,p4m,cnn_params. Prints NMI with the classes, untrained and trained, mean over
seeds with its 95 % interval, and writes fig13_digits and known.csv (per run and epoch)."""

import pandas as pd
import project  # noqa: F401

from lib import data, paths
from lib.metrics import seed_interval
from lib.plots import style, training
from lib.runs import load_run
from lib.study.control import agreement

ARMS = ("alexnet-plain", "p4m", "cnn_params")


def main() -> None:
    panels, rows, counts = {}, [], []
    for dataset, way in {"digits": "upright", "digits-turned": "turned"}.items():
        classes = data.load(paths.dataset_dir(dataset))[1]["findings"].to_numpy()
        tables = panels[f"digits, {way}"] = {}
        for arm in ARMS:
            done = paths.runs_dir(dataset).glob(f"{arm}/seed*/clustering.npz")
            runs = {int(file.parent.name[4:]): load_run(file.parent) for file in done}
            found = [agreement(runs[seed], classes).assign(seed=seed) for seed in sorted(runs)]
            tables[arm] = pd.concat(found, ignore_index=True)
            rows.append(tables[arm].assign(dataset=dataset, arm=arm))
            ends = tables[arm].pivot(index="seed", columns="epoch", values="nmi").iloc[:, [0, -1]]
            shown = ["{:.3f} ({:.3f} to {:.3f})".format(*seed_interval(ends[e])) for e in ends]
            rises = (ends.iloc[:, 1] > ends.iloc[:, 0]).sum()
            print(f"| {way} | {arm} | {' | '.join(shown)} | {rises} of {len(ends)} |")
        counts.append(f"{len(runs)} {way}")
    label = f"1,797 handwritten digits; seeds: {', '.join(counts)}; no arm rotated"
    folder = paths.figures_dir("digits")
    folder.mkdir(parents=True, exist_ok=True)
    style.save(training.known_classes(panels, label, "digit classes"), folder / "fig13_digits")
    with paths.atomic_write(folder / "known.csv", "w") as handle:
        pd.concat(rows).to_csv(handle, index=False, float_format="%.4f", lineterminator="\n")


if __name__ == "__main__":
    main()
