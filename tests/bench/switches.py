"""What the switches of TrainConfig, and memory that is kept, are worth: training steps and features
of both arms, as ratios to none.

    python tests/bench/switches.py [--device cpu|cuda] [--rounds 5] [--batch 128] [--widths
    quick|study|paper]

Interleaved; a ratio is the median over the rounds of (time without / time with, same round): above
1 the switch pays. The time `torch.compile` takes at the start is given beside it. "memory kept" is
what `fit` does by itself (`lib.memory`): run this without MALLOC_MMAP_MAX_ in the environment, and
each of its times is the second of two calls."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.deepcluster import to_channels_last  # noqa: E402
from lib.memory import freed_memory_kept  # noqa: E402
from lib.models import build  # noqa: E402

VARIANTS = (
    "none",
    "memory kept",
    "channels_last",
    "compile",
    "bfloat16",
    "bfloat16 + channels_last",
)


class Variant:
    """A network with one set of switches, and its clock."""

    def __init__(self, backbone: str, width: list[int], name: str, batch: int, device: str) -> None:
        self.device, self.bf16, self.kept = device, "bfloat16" in name, name == "memory kept"
        self.model = build(backbone, 200, width).to(device)
        if "channels_last" in name:
            to_channels_last(self.model)
        if name == "compile":
            self.model.features = torch.compile(self.model.features)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.x = torch.rand(batch, 1, 64, 64, device=device)
        self.y = torch.arange(batch, device=device) % 200

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = torch.nn.functional.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def features(self) -> None:
        self.model.eval()
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            self.model.features(self.x)
        self.model.train()

    def clock(self, work: str) -> float:
        with freed_memory_kept() if self.kept else nullcontext():
            if self.kept:
                getattr(self, work)()
            if self.device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            getattr(self, work)()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--widths", default="quick", choices=["quick", "study", "paper"])
    parser.add_argument("--arms", nargs="+", default=["alexnet", "p4m"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    options = parser.parse_args()
    preset = yaml.safe_load(
        (ROOT / "notebooks" / "params" / f"{options.widths}.yaml").read_text(encoding="utf-8")
    )
    threads = torch.get_num_threads()
    print(
        f"PyTorch {torch.__version__}, {options.device}, {threads} thread(s), batch {options.batch}, {options.widths} widths"
    )
    for arm in options.arms:
        names = ["none", *(name for name in options.variants if name != "none")]
        variants, first = {}, {}
        for name in names:
            variants[name] = Variant(
                arm, preset[f"{arm}_width"], name, options.batch, options.device
            )
            try:
                first[name] = sum(
                    variants[name].clock(work) for work in ("step", "features", "step")
                )
            except Exception as error:  # a switch that this machine cannot do is a result, too
                print(
                    f"{arm:8} {name:26} fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
                )
                del variants[name]
        times: dict[str, dict[str, list[float]]] = {
            work: {name: [] for name in variants} for work in ("step", "features")
        }
        for _ in range(options.rounds):
            for name, variant in variants.items():
                for work, found in times.items():
                    found[name].append(variant.clock(work))
        for name in variants:
            cells = []
            for work, found in times.items():
                ratio = statistics.median(
                    a / b for a, b in zip(found["none"], found[name], strict=True)
                )
                cells.append(
                    f"{work} {statistics.median(found[name]) * 1e3:8.1f} ms, {ratio:5.2f}x"
                )
            print(
                f"{arm:8} {name:26} {'   '.join(cells)}   first calls {first[name]:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
