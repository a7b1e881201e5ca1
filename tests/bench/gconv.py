"""How fast the group convolutions are: whole networks, interleaved in one process, as shares of a
plain network of the same real channels.

    python tests/bench/gconv.py [--device cpu|cuda] [--dtype float32|bfloat16] [--repeats 7]
    [--threads 2] [--widths 64,128,256 ...]
                                [--give-back]

Networks: lifting 5x5, then two group convolutions 3x3, each with batch norm, ReLU and pool of
stride 2; group max-pool, mean, linear layer. Where escnn (Cesa, Lang and Weiler 2022) is installed,
the same network of its layers is measured too.

One round runs every variant once; a ratio is the median over the rounds of (variant / plain, same
round), with the ratio of the fastest rounds beside it. "step" is forward, backward and an SGD
update. Peak memory is of training steps, above the start's, each variant in a process of its own.
Freed memory is kept for the next array, for every variant, as in this project's training
(`lib.memory`); with --give-back, and where memory is measured, glibc gives it back to the system,
as in any other program."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.fast import gkernel  # noqa: E402
from lib.gconv import GroupAvgBlurPool, GroupBatchNorm, P4MConvP4M, P4MConvZ2, group_max_pool  # noqa: E402
from lib.parallel import freed_memory_kept  # noqa: E402

VARIANTS = (
    "plain",
    "dense",
    "auto",
    "auto, no compiler",
    *(["escnn"] if importlib.util.find_spec("escnn") else []),
)
# width -> shares of plain: step without, step with, forward without, forward with a compiler
BARS = {
    (64, 128, 256): (0.40, 0.33, 0.45, 0.40),
    (16, 32, 64): (None, 0.65, None, None),
    (8, 16, 32): (None, 0.95, None, None),
}


class EscnnConv(nn.Module):
    """escnn's convolution of regular fields of D4, from and to tensors (N, C, 8, H, W) or, first
    layer, from (N, 1, H, W).
    """

    def __init__(self, fields_in: int | None, fields_out: int, kernel_size: int) -> None:
        super().__init__()
        from escnn import gspaces
        from escnn import nn as enn

        space = gspaces.flipRot2dOnR2(4)
        self.fields, self.wrap = fields_out, enn.GeometricTensor
        self.type_in = enn.FieldType(
            space, [space.trivial_repr] if fields_in is None else fields_in * [space.regular_repr]
        )
        type_out = enn.FieldType(space, fields_out * [space.regular_repr])
        # its default initialisation takes minutes at this width, and speed does not depend on the
        # weights
        self.conv = enn.R2Conv(
            self.type_in,
            type_out,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
            initialize=False,
        )
        nn.init.normal_(self.conv.weights, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2) if x.ndim == 5 else x
        return self.conv(self.wrap(x, self.type_in)).tensor.unflatten(1, (self.fields, 8))


class GroupMaxPool(nn.Module):
    """`group_max_pool` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_max_pool(x)


def network(variant: str, widths: tuple[int, ...]) -> nn.Module:
    """The reference network of a variant, for images (N, 1, 64, 64)."""
    layers, fields = [], 1
    for index, width in enumerate(widths):
        kernel_size = 3 if index else 5
        if variant == "plain":
            channels = 8 * fields if index else 1
            layers += [
                nn.Conv2d(channels, 8 * width, kernel_size, padding=kernel_size // 2, bias=False),
                nn.BatchNorm2d(8 * width),
            ]
        elif variant == "escnn":
            layers += [
                EscnnConv(fields if index else None, width, kernel_size),
                GroupBatchNorm(width),
            ]
        else:
            conv = P4MConvP4M if index else P4MConvZ2
            algorithm = variant.split(",")[0]
            layers += [
                conv(
                    fields,
                    width,
                    kernel_size,
                    padding=kernel_size // 2,
                    bias=False,
                    algorithm=algorithm,
                ),
                GroupBatchNorm(width),
            ]
        layers += [nn.ReLU(inplace=True), GroupAvgBlurPool()]
        fields = width
    split = [nn.Unflatten(1, (fields, 8))] if variant == "plain" else []
    return nn.Sequential(
        *layers,
        *split,
        GroupMaxPool(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(fields, 200),
    )


class Bench:
    """One variant, ready to run a forward pass or a training step on random images."""

    def __init__(
        self, variant: str, widths: tuple[int, ...], batch: int, device: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.variant, self.device, self.dtype = variant, device, dtype
        self.net = network(variant, widths).to(device)
        self.images = torch.randn(batch, 1, 64, 64, device=device)
        self.labels = torch.randint(0, 200, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)

    def context(self):
        return (
            torch.autocast(self.device, self.dtype)
            if self.dtype != torch.float32
            else nullcontext()
        )

    def forward(self) -> None:
        self.net.eval()
        with torch.no_grad(), self.context():
            self.net(self.images)

    def step(self) -> None:
        self.net.train()
        self.optimizer.zero_grad()
        with self.context():
            loss = nn.functional.cross_entropy(self.net(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def run(self, phase: str) -> float:
        """Seconds of one pass."""
        no_compiler = (
            mock.patch.object(gkernel, "kernel", return_value=None)
            if "no compiler" in self.variant
            else nullcontext()
        )
        with no_compiler:
            self.synchronize()
            start = time.perf_counter()
            getattr(self, phase)()
            self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(bench: Bench) -> int:
    """Largest memory during three training steps above that before them, in bytes."""
    if bench.device == "cuda":
        start = torch.cuda.memory_allocated()
        bench.run("step")
        torch.cuda.reset_peak_memory_stats()
        bench.run("step")
        return torch.cuda.max_memory_allocated() - start
    start = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        bench.run("step")
    done.set()
    watcher.join()
    return peak - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--widths", nargs="+", default=["64,128,256", "16,32,64", "8,16,32"])
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="let the C library give freed memory back, as it does by default",
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with nullcontext(False) if options.give_back else freed_memory_kept() as kept:
        measure(options, kept)


def measure(options: argparse.Namespace, kept: bool) -> None:
    """Print the tables."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    all_widths = [tuple(map(int, widths.split(","))) for widths in options.widths]
    if options.memory_of:
        print(
            peak_memory(
                Bench(options.memory_of, all_widths[0], options.batch, options.device, dtype)
            )
        )
        return

    processor = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.machine()}, {options.threads} threads"
    )
    kernel = "compiled kernel" if gkernel.available() else "no compiler"
    print(
        f"PyTorch {torch.__version__}, {processor}, {options.dtype}, "
        f"batch {options.batch}, {options.repeats} rounds, {kernel}"
    )
    kept = kept or os.environ.get("MALLOC_MMAP_MAX_") == "0"
    print(f"Freed memory is {'kept for the next array' if kept else 'given back to the system'}\n")
    print(
        "| fields | pass | plain, ms | "
        + " | ".join(VARIANTS[1:])
        + " | bar: auto | bar: no compiler |"
    )
    print("| --- " * (len(VARIANTS) + 4) + "|")
    for widths in all_widths:
        benches = [
            Bench(variant, widths, options.batch, options.device, dtype) for variant in VARIANTS
        ]
        for phase, first in (("forward", 2), ("step", 0)):
            for bench in benches:
                bench.run(phase)
            rounds = [[bench.run(phase) for bench in benches] for _ in range(options.repeats)]
            fastest = [min(times) for times in zip(*rounds, strict=True)]
            cells = [
                f"{statistics.median(times[i] / times[0] for times in rounds):.2f} "
                f"({fastest[i] / fastest[0]:.2f})"
                for i in range(1, len(VARIANTS))
            ]
            bars = BARS.get(widths, (None,) * 4)
            limits = [f"{bar:.2f}" if bar else "" for bar in (bars[first + 1], bars[first])]
            print(
                f"| {'/'.join(map(str, widths))} | {phase} | {fastest[0] * 1e3:.1f} | "
                f"{' | '.join(cells + limits)} |",
                flush=True,
            )
        del benches
        if options.device == "cpu" and not Path("/proc/self/statm").exists():
            continue
        peaks = [
            int(
                subprocess.run(
                    [*command, "--memory-of", variant], check=True, capture_output=True, text=True
                ).stdout
            )
            for command in [
                [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--give-back",
                    "--widths",
                    ",".join(map(str, widths)),
                ]
            ]
            for variant in VARIANTS
        ]
        shares = " | ".join(f"{peak / peaks[0]:.2f}" for peak in peaks[1:])
        print(
            f"| {'/'.join(map(str, widths))} | peak memory | {peaks[0] / 2**20:.0f} MiB | "
            f"{shares} | "
            f"{1.3 * peaks[1] / peaks[0]:.2f} | |",
            flush=True,
        )


if __name__ == "__main__":
    main()
