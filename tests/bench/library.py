"""What the layers cost as a library: construction, bytes, `torch.compile` and `torch.export`, as
shares of a plain network of the same real channels, all in one process.

    python tests/bench/library.py [--widths 16,32,64]

The networks are those of tests/bench/gconv.py in evaluation mode; images are (2, 1, 64, 64).
"constructed with weights" runs the library's own initialisation; bytes are those of parameters and
buffers. Time is the processor's; of "compiled" it is the clock's, since compilers are programs of
their own. The least of the repeats counts. escnn (Cesa, Lang and Weiler 2022) if it is there."""

import argparse
import contextlib
import io
import os
import time
import warnings

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # before torch is imported

import gconv as networks
import torch
from torch import nn

KINDS = ("plain", "dense", "auto", *networks.VARIANTS[5:])
REPEATS, OFTEN = 5, ("constructed", "exported")  # the rest once, because it takes long
MEASURES = ("constructed", "constructed with weights", "bytes held", "bytes of a state_dict")
MEASURES += ("compiled, fullgraph", "exported")


def measure(name: str, kind: str, widths: tuple[int, ...], net: nn.Module) -> float:
    """Bytes, or seconds, of one kind of network."""
    if name == "bytes held":
        return sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))
    if name == "bytes of a state_dict":
        torch.save(net.state_dict(), file := io.BytesIO())
        return file.tell()
    x, clock = torch.randn(2, 1, 64, 64), time.process_time
    networks.INITIALISE = name == "constructed with weights"
    if name == "compiled, fullgraph":
        torch.compiler.reset()
        clock = time.perf_counter
    begin = clock()
    if name.startswith("constructed"):
        networks.network(kind, widths)
    elif name == "exported":
        torch.export.export(net, (x,))
    else:
        torch.compile(net, fullgraph=True)(x)
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="16,32,64")
    widths = tuple(map(int, parser.parse_args().widths.split(",")))
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, fields {widths}\n")
    print(f"| | {' | '.join(KINDS)} |\n|---{'|---:' * len(KINDS)}|")
    nets = {kind: networks.network(kind, widths).eval() for kind in KINDS}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for net in nets.values():
            net(torch.randn(2, 1, 64, 64))
        for name in MEASURES:
            values: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for kind in KINDS * (REPEATS if name in OFTEN else 1):
                with contextlib.suppress(Exception):  # then the cell says that it fails
                    values[kind].append(measure(name, kind, widths, nets[kind]))
            plain = min(values["plain"])
            cells = [f"{min(v) / plain:.2f}" if v else "fails" for v in values.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
