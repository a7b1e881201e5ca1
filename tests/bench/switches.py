"""What two choices on a CPU are worth: freed memory kept against given back, and AlexNet's filters
channels-last against contiguous (with memory kept, as in training).

    python tests/bench/switches.py

Both sides run in turn; a ratio is the median over rounds of (time without / time with, same round).
Above 1 the choice pays. Widths are those of the preset `quick`. Memory needs two processes, which
take turns: glibc's thresholds cannot be set back. Run this without MALLOC_ variables."""

import multiprocessing
import statistics
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection

import project  # noqa: F401
import torch

from lib.models import build
from lib.parallel import freed_memory_kept

ROUNDS, BATCH = 7, 128
WIDTHS = {"alexnet": (24, 48, 64, 64, 48, 192), "p4m": (4, 8, 32)}
COMPARISONS = {  # network and whether memory is kept: without the choice, with it
    "alexnet, channels-last": (("alexnet contiguous", True), ("alexnet", True)),
    "alexnet, memory kept": (("alexnet", False), ("alexnet", True)),
    "p4m, memory kept": (("p4m", False), ("p4m", True)),
}


def seconds(model: torch.nn.Module, work: str) -> float:
    x, y = torch.rand(BATCH, 1, 64, 64), torch.arange(BATCH) % 20
    model.train(work == "step").zero_grad()
    begin = time.perf_counter()
    if work == "step":
        torch.nn.functional.cross_entropy(model(x), y).backward()
    else:
        with torch.inference_mode():
            model.features(x)
    return time.perf_counter() - begin


def child(kept: bool, pipe: Connection) -> None:
    """Answer (network, work) with seconds, until None comes."""
    with freed_memory_kept() if kept else nullcontext():
        networks = {name: build(name, 20, width) for name, width in WIDTHS.items()}
        networks["alexnet contiguous"] = build("alexnet", 20, WIDTHS["alexnet"])
        for p in networks["alexnet contiguous"].parameters():
            p.data = p.data.contiguous()
        while asked := pipe.recv():
            pipe.send(seconds(networks[asked[0]], asked[1]))


def main() -> None:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {BATCH}")
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for kept in (False, True):
        pipes[kept], there = spawn.Pipe()
        spawn.Process(target=child, args=(kept, there), daemon=True).start()
    for name, sides in COMPARISONS.items():
        for work in ("step", "features"):
            taken = []
            for _ in range(ROUNDS + 1):  # the first warms up
                taken.append([])
                for network, kept in sides:
                    pipes[kept].send((network, work))
                    taken[-1].append(pipes[kept].recv())
            ratio = statistics.median(without / choice for without, choice in taken[1:])
            ms = 1000 * statistics.median(choice for _, choice in taken[1:])
            print(f"{name:24} {work:9} {ratio:5.2f}x, {ms:7.1f} ms", flush=True)
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
