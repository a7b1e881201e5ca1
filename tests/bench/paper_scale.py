"""How long the paper takes: one epoch of both arms of the `paper` preset, stage by stage, and what
20 epochs of 112,120 images would take.

    python tests/bench/paper_scale.py [--images 112120] [--device auto] [--epochs-measured 1]
    [--save] torchrun --nproc-per-node 8 tests/bench/paper_scale.py        (as many processes; times
    are those of all together)

The images are phantoms, drawn once and repeated where more are asked than `--drawn`; the networks,
K, PCA and batch size are the preset's. What is measured, on the loop's own functions: extraction of
the features of all images, training on all images for an epoch, and the clustering of 112,120 rows
of features whatever `--images` is: below that number, the rows that were extracted are repeated
with noise of a tenth of their spread. Batches before the clock starts warm up the caches.

Floating-point operations are PyTorch's own count (`torch.utils.flop_counter`) of convolutions and
matrix products, two for a multiply-add, forward and backward, of the *dense* group convolution,
whatever algorithm ran. The Fourier algorithm that a CPU takes does with up to 5.8 times fewer, so
its share of the matrix rate may pass 100 %. The matrix rate is that of a large product of square
matrices, measured in this process in the precision that trains."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.data.phantom import make_phantoms  # noqa: E402
from lib.deepcluster import TrainConfig, cluster, to_channels_last, train_epoch  # noqa: E402
from lib.features import extract  # noqa: E402
from lib.gconv import GroupConv  # noqa: E402
from lib.memory import freed_memory_kept  # noqa: E402
from lib.models import build  # noqa: E402
from lib.parallel import World, join, share_layers  # noqa: E402
from lib.paths import atomic_write, figures_root, save_json, show  # noqa: E402

PAPER_IMAGES, PAPER_EPOCHS = 112_120, 20


def arm_configs(options: argparse.Namespace) -> dict[str, TrainConfig]:
    """The two arms of the paper preset, with the switches of the command line."""
    preset = yaml.safe_load(
        (ROOT / "notebooks" / "params" / "paper.yaml").read_text(encoding="utf-8")
    )
    shared = {
        name: preset[name]
        for name in ("n_clusters", "pca_dim", "epochs", "batch_size", "lr", "weight_decay")
    }
    shared |= {
        "amp": options.amp,
        "channels_last": options.channels_last,
        "compile": options.compile,
        "device": options.device,
    }
    return {
        "alexnet": TrainConfig(
            "alexnet",
            width=preset["alexnet_width"],
            rotation_degrees=preset["rotation_degrees"],
            **shared,
        ),
        "p4m": TrainConfig("p4m", width=preset["p4m_width"], **shared),
    }


def phantoms(n: int, drawn: int) -> np.ndarray:
    """n images, of which `drawn` differ."""
    images, _ = make_phantoms(min(n, drawn), seed=0)
    return np.resize(images, (n, *images.shape[1:]))


def flops(config: TrainConfig) -> tuple[float, float]:
    """Floating-point operations an image of the dense algorithm: features, and a training step."""
    model = build(config.backbone, config.n_clusters, config.width)
    for module in model.modules():
        if isinstance(module, GroupConv):
            module.algorithm = "dense"
    x = torch.zeros(2, 1, 64, 64)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.features(x)
    with FlopCounterMode(display=False) as step:
        torch.nn.functional.cross_entropy(model(x), torch.zeros(2, dtype=torch.long)).backward()
    return forward.get_total_flops() / 2, step.get_total_flops() / 2


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of square matrices, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = min(clocked(lambda: a @ b, device)[0] for _ in range(6))
    return 2 * n**3 / best


def clocked(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of `work`, the GPU's included, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, result


def peak_memory(device: torch.device) -> float | None:
    """Largest memory so far in GiB: the GPU's, or that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(
    config: TrainConfig, images: np.ndarray, world: World, epochs: int, rate: float
) -> dict[str, Any]:
    """Seconds and rates of the stages of an arm, means over `epochs` epochs."""
    device, n = world.device, len(images)
    on_gpu = device.type == "cuda"
    autocast = on_gpu and config.amp == "auto"
    held = torch.from_numpy(images).to(device) if on_gpu else images
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    model = share_layers(build(config.backbone, config.n_clusters, config.width).to(device), world)
    if config.channels_last:
        to_channels_last(model)
    if config.compile:
        model.features = torch.compile(model.features)
    optimizers = [
        torch.optim.Adam(p, config.lr, weight_decay=config.weight_decay)
        for p in (model.body_parameters(), model.top_layer.parameters())
    ]

    mine = world.share(n)

    def features_of(rows: slice) -> Any:
        return extract(
            model, held[rows], config.batch_size, device, on_device=on_gpu, autocast=autocast
        )

    few = min(
        n, 2 * config.batch_size if on_gpu else 32
    )  # a CPU has less to warm up, and is slow at it
    warm_up = clocked(
        lambda: (
            features_of(slice(0, few)),
            train_epoch(
                model, optimizers, held[:few], np.arange(few) % config.n_clusters, config, 1, world
            ),
        ),
        device,
    )[0]
    seconds = {"features": 0.0, "cluster": 0.0, "train": 0.0}
    for epoch in range(1, epochs + 1):
        took, features = clocked(lambda: features_of(mine), device)
        seconds["features"] += took / epochs
        rows = at_full_size(features, world)
        took, (assignments, _, kmeans) = clocked(
            lambda rows=rows, epoch=epoch: cluster(rows, config, epoch, world), device
        )
        seconds["cluster"] += took / epochs
        del rows
        labels = assignments[:n] if len(assignments) >= n else np.resize(assignments, n)
        took, loss = clocked(
            lambda labels=labels, epoch=epoch: train_epoch(
                model, optimizers, held, labels, config, epoch, world
            ),
            device,
        )
        seconds["train"] += took / epochs
    at_forward, at_step = flops(config)
    scale = PAPER_IMAGES / n
    projected = {name: s * (1 if name == "cluster" else scale) for name, s in seconds.items()}
    # and the features and clusters of the last network
    total = PAPER_EPOCHS * sum(projected.values()) + projected["features"] + projected["cluster"]
    return {
        "arm": config.backbone,
        "images": n,
        "seconds": seconds,
        "warm_up_seconds": warm_up,
        "images_per_second": {"features": n / seconds["features"], "train": n / seconds["train"]},
        "gflop_per_image": {"features": at_forward / 1e9, "train": at_step / 1e9},
        "tflops": {
            "features": at_forward * n / seconds["features"] / 1e12,
            "train": at_step * n / seconds["train"] / 1e12,
        },
        "share_of_matrix_rate": at_step * n / seconds["train"] / (rate * world.size),
        "kmeans_iterations": kmeans.n_iter_,
        "peak_gib": peak_memory(device),
        "loss": loss,
        "projected_epoch_seconds": projected,
        "projected_seconds": total,
    }


def at_full_size(features: Any, world: World) -> Any:
    """This process's share of 112,120 rows: `features`, repeated with noise of a tenth of their
    spread if there are fewer.
    """
    share = world.share(PAPER_IMAGES)
    wanted = share.stop - share.start
    if len(features) >= wanted:
        return features
    rows = torch.as_tensor(features)
    generator = torch.Generator(rows.device).manual_seed(world.rank)
    spread = 0.1 * rows.std(dim=0)
    full = torch.empty(wanted, rows.shape[1], device=rows.device)
    for start in range(0, wanted, 4096):
        block = full[start : start + 4096]
        index = torch.arange(start, start + len(block), device=rows.device) % len(rows)
        torch.addcmul(
            rows[index],
            torch.randn(block.shape, generator=generator, device=rows.device),
            spread,
            out=block,
        )
    return full if isinstance(features, torch.Tensor) else full.numpy()


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    return f"{name}, {torch.get_num_threads()} thread(s)"


def duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.1f} s"
    )


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = {
        "images measured": lambda a: f"{a['images']:,}",
        "features, images/s": lambda a: f"{a['images_per_second']['features']:,.0f}",
        "training, images/s": lambda a: f"{a['images_per_second']['train']:,.1f}",
        f"clustering of {PAPER_IMAGES:,} rows, s": lambda a: (
            f"{a['seconds']['cluster']:.1f} ({a['kmeans_iterations']} iterations)"
        ),
        "GFLOP an image (dense): features, training": lambda a: " and ".join(
            f"{v:.2f}" for v in a["gflop_per_image"].values()
        ),
        "model TFLOP/s in training": lambda a: f"{a['tflops']['train']:.3f}",
        "share of the measured matrix rate": lambda a: f"{a['share_of_matrix_rate']:.0%}",
        "peak memory, GiB": lambda a: "-" if a["peak_gib"] is None else f"{a['peak_gib']:.1f}",
        **{
            f"projected epoch: {stage}": lambda a, stage=stage: duration(
                a["projected_epoch_seconds"][stage]
            )
            for stage in ("features", "cluster", "train")
        },
        f"projected: {PAPER_EPOCHS} epochs of {PAPER_IMAGES:,} images": lambda a: duration(
            a["projected_seconds"]
        ),
    }
    arms = report["arms"]
    lines = [
        f"| {report['hardware']} | " + " | ".join(a["arm"] for a in arms) + " |",
        "|---|" + "---:|" * len(arms),
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(a) for a in arms) + " |" for name, cell in rows.items()
    ]
    both = sum(a["projected_seconds"] for a in arms)
    lines += [
        "",
        f"Projected for {' and '.join(a['arm'] for a in arms)}, one seed: {duration(both)}.",
        "",
    ]
    lines += [
        f"{report['software']}; {report['processes']} process(es); precision {report['precision']}; "
        f"matrix rate {report['matrix_tflops']:.3f} TFLOP/s a process."
    ]
    lines += [f"Switches: {report['switches']}.", "", f"Assumption: {report['assumption']}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=PAPER_IMAGES)
    parser.add_argument(
        "--drawn",
        type=int,
        default=4000,
        help="phantoms that differ; more are repetitions (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--epochs-measured", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=["alexnet", "p4m"], choices=["alexnet", "p4m"])
    parser.add_argument("--amp", default="auto", choices=["auto", "off"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, help="threads of a CPU (default: PyTorch's)")
    parser.add_argument(
        "--save", action="store_true", help="write figures/bench/paper_scale_<device>.{md,json}"
    )
    options = parser.parse_args()
    if options.epochs_measured < 1:
        parser.error("--epochs-measured must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    configs = {
        name: config for name, config in arm_configs(options).items() if name in options.arms
    }
    least = next(iter(configs.values())).n_clusters
    if options.images < least:
        parser.error(f"--images must be at least K = {least}")
    images = phantoms(options.images, options.drawn)

    with join(options.device) as world, freed_memory_kept():  # as in lib.deepcluster.fit
        gpu = world.device.type == "cuda"
        dtype = torch.bfloat16 if gpu and options.amp == "auto" else torch.float32
        rate = matrix_rate(world.device, dtype)
        arms = []
        for config in configs.values():
            arms.append(
                measure(
                    replace(config, device=world.device.type),
                    images,
                    world,
                    options.epochs_measured,
                    rate,
                )
            )
            if world.main:
                print(f"{arms[-1]['arm']}: {arms[-1]['seconds']}", file=sys.stderr, flush=True)
        assumption = (
            f"features and training take the measured time an image, {PAPER_IMAGES:,} times; "
            f"clustering was measured on {PAPER_IMAGES:,} rows"
            + (
                ""
                if options.images >= PAPER_IMAGES
                else f" made of the {options.images:,} extracted ones by repetition with noise"
            )
            + "; every epoch takes as long as the measured; reading images, writing files and a compiler's start are left out."
        )
        report = {
            "hardware": hardware(world.device),
            "processes": world.size,
            "software": f"PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
            "precision": str(dtype).removeprefix("torch."),
            "matrix_tflops": rate / 1e12,
            "switches": f"amp={options.amp}, channels_last={options.channels_last}, compile={options.compile}",
            "arms": arms,
            "assumption": assumption,
        }
    if world.main:
        print(table(report))
        if options.save:
            name = world.device.type + (f"_x{world.size}" if world.size > 1 else "")
            target = figures_root() / "bench" / f"paper_scale_{name}"
            save_json(target.with_suffix(".json"), report)
            with atomic_write(target.with_suffix(".md"), "w") as handle:
                handle.write(table(report))
            print(f"written: {show(target)}.md, .json")


if __name__ == "__main__":
    main()
