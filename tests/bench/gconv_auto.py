"""Where the Fourier algorithm beats the dense one, layer by layer, and what ``algorithm="auto"``
takes: the source of its limits.

    python tests/bench/gconv_auto.py [--threads 2] [--rounds 7] [--quick]

A cell is the time of the Fourier algorithm as a share of the dense one's (median over the rounds of
the ratio of the same round), forward without gradients / forward and backward, in bold where
``auto`` takes Fourier. Lifting layers get no gradient of their input. Freed memory is kept, as in
this project's training."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib import fast  # noqa: E402
from lib.fast import gkernel  # noqa: E402
from lib.gconv import GroupConv, P4ConvP4, P4ConvZ2, P4MConvP4M, P4MConvZ2  # noqa: E402
from lib.parallel import freed_memory_kept  # noqa: E402

FIELDS = (
    (2, 4),
    (4, 4),
    (4, 8),
    (8, 8),
    (8, 16),
    (16, 8),
    (16, 16),
    (4, 64),
    (64, 4),
    (16, 32),
    (32, 32),
    (64, 64),
    (64, 128),
)
SHAPES = (
    (3, 1, 32, 8),
    (3, 2, 33, 8),
    (1, 1, 32, 8),
    (5, 1, 16, 8),
    (3, 1, 32, 1),
)  # kernel size, stride, side, images
LIFTED = ((1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (3, 16), (3, 64), (16, 16))
LIFTING_SHAPES = ((5, 1, 64, 8), (3, 1, 64, 8))


def seconds(layer: GroupConv, x: torch.Tensor, step: bool) -> float:
    layer.zero_grad()
    x.grad = None
    start = time.perf_counter()
    with torch.set_grad_enabled(step):
        y = layer(x)
        if step:
            y.square().mean().backward()
    return time.perf_counter() - start


def compare(
    make: type[GroupConv], fields: tuple[int, int], shape: tuple[int, ...], rounds: int
) -> tuple[list[float], list[bool]]:
    """Fourier / dense for forward and step, and whether ``auto`` takes Fourier for each."""
    kernel_size, stride, side, images = shape
    dense, fourier, auto = (
        make(*fields, kernel_size, stride, kernel_size // 2, algorithm=name)
        for name in ("dense", "fourier", "auto")
    )
    x = torch.randn(images, fields[0], *([] if make.lifting else [make.group.order]), side, side)
    ratios, taken = [], []
    for step in (False, True):
        x.requires_grad_(step and not make.lifting)
        with torch.set_grad_enabled(step):
            taken.append(fast.faster(auto, x))
        for layer in (dense, fourier):
            seconds(layer, x, step)
        pairs = [(seconds(dense, x, step), seconds(fourier, x, step)) for _ in range(rounds)]
        ratios.append(statistics.median(ours / theirs for theirs, ours in pairs))
    return ratios, taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the first shape of each layer alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"PyTorch {torch.__version__}, {options.threads} threads, float32, {options.rounds} rounds"
    )
    chosen, left = [], []
    for compiled in (True, False):
        if compiled and not gkernel.available():
            print("\nno compiler: nothing measured with the kernel")
            continue
        for make in (P4MConvP4M, P4ConvP4, P4MConvZ2, P4ConvZ2):
            fields, shapes = (LIFTED, LIFTING_SHAPES) if make.lifting else (FIELDS, SHAPES)
            shapes = shapes[: 1 if options.quick else None]
            heads = [
                f"{k}x{k}{f'/{stride}' if stride > 1 else ''}, {side} px, {images}"
                for k, stride, side, images in shapes
            ]
            print(
                f"\n{make.__name__}, {'with' if compiled else 'without'} the compiled kernel\n\n"
                f"| fields | {' | '.join(heads)} |"
            )
            print("| --- " * (len(heads) + 1) + "|")
            for pair in fields:
                cells = []
                for shape in shapes:
                    with (
                        nullcontext()
                        if compiled
                        else mock.patch.object(gkernel, "kernel", return_value=None)
                    ):
                        ratios, taken = compare(make, pair, shape, options.rounds)
                    both = list(zip(ratios, taken, strict=True))
                    cells.append(
                        " / ".join(
                            f"**{ratio:.2f}**" if take else f"{ratio:.2f}" for ratio, take in both
                        )
                    )
                    for ratio, take in both:
                        (chosen if take else left).append(ratio)
                print(f"| {pair[0]} -> {pair[1]} | {' | '.join(cells)} |", flush=True)
    print(f"\nauto takes Fourier {len(chosen)} times, worst {max(chosen, default=0):.2f}")
    print(f"and dense {len(left)} times, where Fourier is {min(left):.2f} at best")


if __name__ == "__main__":
    with freed_memory_kept():
        main()
