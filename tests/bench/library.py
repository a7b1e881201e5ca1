"""What the layers cost as a library: construction, bytes, `torch.compile` and `torch.export`, as
shares of a plain network of the same real channels, all in one process.

    python tests/bench/library.py [--widths 16,32,64] [--repeats 5]

The networks are those of tests/bench/gconv.py in evaluation mode; images are (2, 1, 64, 64).
"constructed with weights" runs the library's own initialisation. Bytes are those of parameters and
buffers. Time is that of the processor, which other programs disturb less; of "compiled" it is the
clock's, since compilers are programs of their own. The least of the repeats counts. escnn (Cesa,
Lang and Weiler 2022) is measured if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # before torch is imported

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import gconv as networks  # noqa: E402

KINDS = ("plain", "dense", "auto", *networks.VARIANTS[5:])


def built(kind: str, widths: tuple[int, ...], own_weights: bool) -> nn.Module:
    networks.INITIALISE = own_weights
    return networks.network(kind, widths).eval()


def held(net: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))


def stored(net: nn.Module) -> int:
    """Bytes of the state_dict as it is saved."""
    torch.save(net.state_dict(), file := io.BytesIO())
    return file.tell()


def compiled(net: nn.Module, x: torch.Tensor) -> None:
    torch.compiler.reset()
    torch.compile(net, fullgraph=True)(x)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    widths = tuple(map(int, options.widths.split(",")))
    torch.set_num_threads(1)
    x = torch.randn(2, 1, 64, 64)
    nets = {kind: built(kind, widths, own_weights=False) for kind in KINDS}
    once = 1  # what takes long is done once
    measures: dict[str, tuple[int, Callable[[str], float]]] = {
        "constructed": (
            options.repeats,
            lambda kind: seconds(lambda: built(kind, widths, own_weights=False)),
        ),
        "constructed with weights": (
            once,
            lambda kind: seconds(lambda: built(kind, widths, own_weights=True)),
        ),
        "bytes held": (once, lambda kind: held(nets[kind])),
        "bytes of a state_dict": (once, lambda kind: stored(nets[kind])),
        "compiled, fullgraph": (
            once,
            lambda kind: seconds(lambda: compiled(nets[kind], x), time.perf_counter),
        ),
        "exported": (
            options.repeats,
            lambda kind: seconds(lambda: torch.export.export(nets[kind], (x,))),
        ),
    }
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"PyTorch {torch.__version__}, fields {options.widths}, load of the machine {load}\n")
    print(f"| | {' | '.join(KINDS)} |\n|---{'|---:' * len(KINDS)}|")
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for net in nets.values():
            net(x)
        for name, (repeats, measure) in measures.items():
            values: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(repeats):
                for kind in KINDS:
                    with contextlib.suppress(Exception):  # then the cell says that it fails
                        values[kind].append(measure(kind))
            plain = min(values["plain"])
            cells = [f"{min(v) / plain:.2f}" if v else "fails" for v in values.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
