"""How fast the group convolutions are: whole networks, interleaved in one process, as shares of a
plain network of the same real channels.

    python tests/bench/gconv.py [--widths 64,128,256 ...] [--repeats 7] [--threads 2] [--batch 8]
                                [--layers]

Networks: lifting 5x5, then two group convolutions 3x3, each with batch norm, ReLU and pool of
stride 2; group max-pool, mean, linear layer. If escnn (Cesa, Lang and Weiler 2022) is installed,
the same network of its layers is measured too. The plain network is measured in both memory formats
and the faster one is the measure.

A round runs every variant once. A share is the median over the rounds of (variant / plain, same
round). "step" is forward, backward and an SGD update. Peak memory is that of training steps, above
the start's, each variant in a process of its own. Freed memory is kept for the next array, as in
this project's training; for peak memory the C library returns it. --layers compares the Fourier
transform with the dense way layer by layer instead, in bold what "auto" takes.
All of it is on the CPU: tests/bench/gpu.py is for a GPU."""

import argparse
import importlib.util
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import project  # noqa: F401
import psutil
import torch
from torch import nn

from lib import fast, gconv
from lib.fast import gkernel
from lib.parallel import freed_memory_kept

PLAIN = ("plain", "plain, channels last")
VARIANTS = (*PLAIN, "dense", "auto", "auto, no compiler")
VARIANTS += ("escnn",) if importlib.util.find_spec("escnn") else ()
WIDTHS = ["64,128,256", "16,32,64", "8,16,32", "4,8,32"]
INITIALISE = False  # escnn's own initialisation of the weights
FIELDS = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (16, 16), (4, 64), (64, 4), (64, 64))
LIFTED = ((1, 1), (1, 2), (1, 4), (1, 16), (1, 64), (3, 16), (16, 16))


class EscnnConv(nn.Module):
    """escnn's convolution of regular fields of D4, from and to tensors (N, C, 8, H, W) or, first
    layer, from (N, 1, H, W)."""

    def __init__(self, fields_in: int, fields_out: int, kernel_size: int, lifting: bool) -> None:
        super().__init__()
        from escnn import gspaces
        from escnn import nn as enn

        space = gspaces.flipRot2dOnR2(4)
        self.fields, self.wrap = fields_out, enn.GeometricTensor
        kinds = [space.trivial_repr] if lifting else fields_in * [space.regular_repr]
        self.type_in = enn.FieldType(space, kinds)
        type_out = enn.FieldType(space, fields_out * [space.regular_repr])
        options = {"padding": kernel_size // 2, "bias": False}
        # its own initialisation can take minutes, and speed does not depend on the weights
        options["initialize"] = INITIALISE
        self.conv = enn.R2Conv(self.type_in, type_out, kernel_size, **options)
        if not INITIALISE:
            nn.init.normal_(self.conv.weights, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2) if x.ndim == 5 else x
        return self.conv(self.wrap(x, self.type_in)).tensor.unflatten(1, (self.fields, 8))


class Head(nn.Module):
    """Group max-pool, mean and linear layer."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.linear = nn.Linear(fields, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = x if x.ndim == 5 else x.unflatten(1, (-1, 8))
        return self.linear(gconv.group_max_pool(maps).mean((2, 3)))


def network(variant: str, widths: tuple[int, ...]) -> nn.Module:
    """The reference network of a variant, for images (N, 1, 64, 64)."""
    blocks, fields, name = [], 1, variant.split(",")[0]
    for index, width in enumerate(widths):
        lifting, k = not index, 3 if index else 5
        rest = nn.ReLU(inplace=True), gconv.GroupAvgBlurPool()
        if name == "plain":
            channels = 1 if lifting else 8 * fields
            conv = nn.Conv2d(channels, 8 * width, k, padding=k // 2, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(8 * width), *rest))
        elif name == "escnn":
            conv = EscnnConv(fields, width, k, lifting)
            blocks.append(nn.Sequential(conv, gconv.GroupBatchNorm(width), *rest))
        else:
            kind = gconv.P4MConvZ2 if lifting else gconv.P4MConvP4M
            conv = kind(fields, width, k, padding=k // 2, bias=False, algorithm=name)
            blocks.append(gconv.GroupBlock(conv, gconv.GroupBatchNorm(width), *rest))
        fields = width
    return nn.Sequential(*blocks, Head(fields))


def compiler(variant: str):
    """The compiled kernel, unless the variant does without."""
    missing = "no compiler" in variant
    return mock.patch.object(gkernel, "kernel", return_value=None) if missing else nullcontext()


class Bench:
    """One variant, ready to run a forward pass or a training step on random images."""

    def __init__(self, variant: str, widths: tuple[int, ...], options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.variant = variant
        last = torch.channels_last if "last" in variant else torch.contiguous_format
        self.net = network(variant, widths).to(memory_format=last)
        self.images = torch.randn(options.batch, 1, 64, 64).contiguous(memory_format=last)
        self.labels = torch.randint(0, 200, (options.batch,))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)

    def forward(self) -> None:
        self.net.eval()
        with torch.no_grad():
            self.net(self.images)

    def step(self) -> None:
        self.net.train()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self.images), self.labels).backward()
        self.optimizer.step()

    def run(self, phase: str) -> float:
        """Seconds of one pass."""
        with compiler(self.variant):
            start = time.perf_counter()
            getattr(self, phase)()
            return time.perf_counter() - start


def peak_memory(bench: Bench) -> int:
    """Largest memory of this process after three training steps above that before, in bytes."""
    start = psutil.Process().memory_info().rss
    for _ in range(3):
        bench.run("step")
    # getrusage also counts the process that started this one
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak) - start


def networks(options: argparse.Namespace) -> None:
    """Print the table of the networks."""
    columns = ["fields", "pass", "plain, ms", *VARIANTS[2:]]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for text in options.widths:
        widths = tuple(map(int, text.split(",")))
        benches = [Bench(variant, widths, options) for variant in VARIANTS]
        for phase in ("forward", "step"):
            for bench in benches:
                bench.run(phase)
            rounds = [[bench.run(phase) for bench in benches] for _ in range(options.repeats)]
            medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
            best = min(range(len(PLAIN)), key=lambda i: medians[i])
            others = range(len(PLAIN), len(VARIANTS))
            shares = [statistics.median(t[i] / t[best] for t in rounds) for i in others]
            cells = [f"{medians[best] * 1e3:.1f}", *(f"{share:.2f}" for share in shares)]
            print(f"| {text} | {phase} | {' | '.join(cells)} |", flush=True)
        del benches
        command = [sys.executable, __file__, *sys.argv[1:], "--widths", text, "--memory-of"]
        peaks = [int(subprocess.check_output([*command, name], text=True)) for name in VARIANTS]
        least = min(peaks[: len(PLAIN)])
        cells = [f"{least / 2**20:.0f} MiB", *(f"{peak / least:.2f}" for peak in peaks[2:])]
        print(f"| {text} | peak memory | {' | '.join(cells)} |", flush=True)


def seconds(layer: nn.Module, x: torch.Tensor, step: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(step):
        y = layer(x)
        if step:
            y.square().mean().backward()
    return time.perf_counter() - start


def layers(options: argparse.Namespace) -> None:
    """Print Fourier / dense of single layers, forward / step."""
    kinds = (gconv.P4MConvP4M, gconv.P4ConvP4, gconv.P4MConvZ2, gconv.P4ConvZ2)
    for variant in ("with the compiled kernel", "no compiler"):
        for kind in kinds:
            print(f"\n{kind.__name__}, {variant}\n\n| fields | forward | step |\n{'| --- ' * 3}|")
            for fields in LIFTED if kind.lifting else FIELDS:
                k, side = (5, 64) if kind.lifting else (3, 32)
                group = [] if kind.lifting else [kind.group.order]
                x = torch.randn(options.batch, fields[0], *group, side, side)
                cells = []
                for step in (False, True):
                    x.requires_grad_(step and not kind.lifting)
                    dense = kind(*fields, k, padding=k // 2, algorithm="dense")
                    ours = kind(*fields, k, padding=k // 2, algorithm="fourier")
                    with compiler(variant):
                        taken, shares = fast.faster(ours, x), []
                        for _ in range(options.repeats + 1):
                            shares.append(1 / seconds(dense, x, step) * seconds(ours, x, step))
                    share = f"{statistics.median(shares[1:]):.2f}"
                    cells.append(f"**{share}**" if taken else share)
                print(f"| {fields[0]} -> {fields[1]} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--widths", nargs="+", default=WIDTHS)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        bench = Bench(options.memory_of, tuple(map(int, options.widths[0].split(","))), options)
        print(peak_memory(bench))
        return
    kernel = "compiled kernel" if gkernel.available() else "no compiler"
    where = f"{platform.machine()}, {options.threads} threads, batch {options.batch}, {kernel}"
    print(f"PyTorch {torch.__version__}, {where}")
    print(f"{options.repeats} rounds\n")
    with freed_memory_kept():
        layers(options) if options.layers else networks(options)


if __name__ == "__main__":
    main()
