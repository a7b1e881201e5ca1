"""What this project does on one GPU, in at most 8 minutes: figures/bench/gpu.md and gpu.json.

    python tests/bench/gpu.py [--minutes 8] [--out FOLDER]
    python tests/bench/gpu.py --tiny --device cpu        all of it small, in about a minute, no GPU

Five parts: the CPU's numbers again; speed beside a plain network; clustering; images per second of
both arms at the paper's settings; a whole epoch of both arms. What fails or has no time left says
so in the table, and the rest goes on. Rounds of all networks are interleaved; a ratio is the median
over rounds of (network / plain, same round)."""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import project  # noqa: F401
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from lib import gconv
from lib.data.phantom import make_phantoms
from lib.deepcluster import TrainConfig, Training, fit, train_epoch
from lib.fast import gfourier
from lib.features import PCAWhiten
from lib.kmeans import make_clusterer
from lib.models import build
from lib.parallel import World
from lib.paths import ROOT

WIDE, NARROW, SMALL = (64, 128, 256), (16, 32, 64), (2, 4, 8)
ALEXNET, LITTLE = (96, 256, 384, 384, 256, 4096), (8, 16, 24, 24, 16, 64)
SIZES = {  # in full, tiny
    "batch": (256, 8),
    "fields": ((WIDE, NARROW), (SMALL,)),
    "arms": ({"alexnet": ALEXNET, "p4m": WIDE}, {"alexnet": LITTLE, "p4m": SMALL}),
    "layer": ((16, 32), (2, 3)),  # fields of single layers
    "rounds": (7, 2),
    "calls": (5, 1),  # per round
    "images": (112_120, 400),
    "drawn": (4000, 64),  # phantoms that differ; the others repeat them
    "epoch_images": (20_000, 120),
    "k": (200, 8),
    "pca_dim": (64, 4),
    "batches": (20, 3),  # of which rates are measured, after as many to warm up
}
FLOAT32 = nullcontext()


class OutOfTime(BaseException):
    """A part's time is over; no ``except Exception`` on the way swallows it."""


class Bench:
    """The table as it grows, the device, and its clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.s = SimpleNamespace(**{name: size[options.tiny] for name, size in SIZES.items()})
        self.device, self.gpu = torch.device(options.device), options.device == "cuda"
        self.rows: list[dict[str, Any]] = []
        self.cluster_seconds: dict[str, float] = {}  # by arm
        self.options, self.part, self.failed, self.until = options, "", 0, time.monotonic()

    def add(self, what: str, result: str, **numbers: Any) -> None:
        """A row of the table; `numbers` go to the JSON file."""
        self.rows.append({"part": self.part, "what": what, "result": result, **numbers})
        print(f"  {what}: {result}", flush=True)

    def look_at_the_clock(self) -> None:
        """Before each measurement, so that a part may overrun by one."""
        if time.monotonic() > self.until:
            raise OutOfTime

    def attempt(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        """What `work` returns; None, and a row that says why, if it fails."""
        self.look_at_the_clock()
        try:
            return work(*args)
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            reason = (str(error).splitlines() or [""])[0][:160].replace("|", "/")
            self.add(what, f"FAILED: {type(error).__name__}: {reason}")

    def seconds(self, work: Callable[[], Any], calls: int = 1) -> float:
        """Seconds per call, the GPU's work included."""
        self.look_at_the_clock()
        synchronize = torch.cuda.synchronize if self.gpu else lambda: None
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize()
        return (time.perf_counter() - begin) / calls

    def peak(self) -> float:
        """Peak GiB of the GPU since the last call; 0 without a GPU."""
        if not self.gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak

    def release(self) -> None:
        """Give back what compiled code and cached blocks hold."""
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU

    def bfloat16(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def loop(self, n: int, **options: Any) -> tuple[np.ndarray, dict[str, TrainConfig]]:
        """n phantoms (n, 64, 64), and the paper's settings of both arms."""
        s, configs = self.s, {}
        options |= {"n_clusters": s.k, "pca_dim": s.pca_dim, "batch_size": s.batch}
        for arm, width in s.arms.items():
            turned = 180.0 * (arm == "alexnet")
            settings = {"width": width, "rotation_degrees": turned, "device": self.device.type}
            configs[arm] = TrainConfig(arm, **settings, **options)
        return np.resize(make_phantoms(min(n, s.drawn), seed=0)[0], (n, 64, 64)), configs


def numbers(bench: Bench) -> None:
    """Outputs and gradients of layers and of the P4M network, beside the CPU's in float32."""

    def outputs(module: nn.Module, x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with context:
            y = module(x)
        gradients = torch.autograd.grad(y.float().square().mean(), [x, *module.parameters()])
        return y.detach().cpu(), torch.cat([g.cpu().float().flatten() for g in gradients])

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).abs().max() / wanted.abs().max())

    def compare(what: str, module: nn.Module, x: Tensor, context: Any = FLOAT32) -> None:
        found = outputs(module.to(bench.device), x.to(bench.device), context)
        errors = list(map(error, found, wanted))
        bench.add(what, "output {:.1e}, gradients {:.1e}".format(*errors), errors=errors)

    torch.backends.cudnn.allow_tf32 = False
    for kind in (gconv.P4ConvZ2, gconv.P4ConvP4, gconv.P4MConvZ2, gconv.P4MConvP4M):
        layer = kind(*bench.s.layer, 5 if kind.lifting else 3, padding=1, algorithm="dense")
        group = () if kind.lifting else (kind.group.order,)
        x = torch.randn(4, bench.s.layer[0], *group, 24, 24)
        wanted = outputs(layer, x, FLOAT32)
        for layer.algorithm in ("dense", "fourier"):
            what = f"{kind.__name__}, {layer.algorithm}, float32"
            bench.attempt(what, compare, what, layer, x)
    net, x = build("p4m", bench.s.k, bench.s.arms["p4m"]), torch.rand(16, 1, 64, 64) * 2 - 1
    wanted = outputs(net, x, FLOAT32)
    compare("P4M network, float32", net, x)
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch starts
    compare("P4M network, float32 with TF32 convolutions", net, x)
    compare("P4M network, bf16 autocast", net, x, bench.bfloat16())
    x, _ = x.to(bench.device), net.eval()
    for name, context in (("TF32", FLOAT32), ("bf16", bench.bfloat16())):
        with torch.no_grad(), context:
            moved = error(net.features(x.rot90(1, (2, 3))).float(), net.features(x).float())
        bench.add(f"P4M features, images turned by 90 degrees, {name}", f"{moved:.1e}", error=moved)


class Network:
    """A network with bf16 and channels-last filters, its optimiser and a batch."""

    def __init__(self, bench: Bench, name: str, fields: tuple[int, ...], compiled: bool) -> None:
        self.bench, k, batch = bench, bench.s.k, bench.s.batch
        backbone = "cnn_flops" if name == "plain" else "p4m"
        self.net = build(backbone, k, fields).to(bench.device)  # planar filters: channels-last
        self.x = torch.rand(batch, 1, 64, 64, device=bench.device) * 2 - 1
        self.y = torch.arange(batch, device=bench.device) % k
        for layer in self.net.modules():
            if isinstance(layer, gconv.GroupConv):
                layer.algorithm = name
                if name != "auto":  # which is fused, and sees to it by itself
                    layer.filter_bank = partial(self.channels_last, layer)
                if name == "fourier":  # it computes in its inputs' dtype, also under autocast
                    layer.weight.data, self.x = layer.weight.data.bfloat16(), self.x.bfloat16()
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-4)
        options = {"dynamic": False, "backend": bench.options.backend}
        self.call = torch.compile(self.net, **options) if compiled else self.net
        self.first = bench.seconds(lambda: (self.step(), self.forward()))
        bench.peak()
        self.step()
        self.peak = bench.peak()

    @staticmethod
    def channels_last(layer: gconv.GroupConv) -> Tensor:
        return type(layer).filter_bank(layer).contiguous(memory_format=torch.channels_last)

    def forward(self) -> None:
        self.net.eval()
        with torch.no_grad(), self.bench.bfloat16():
            self.call(self.x)

    def step(self) -> None:
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.bench.bfloat16():
            loss = nn.functional.cross_entropy(self.call(self.x), self.y)
        loss.backward()
        self.optimizer.step()


def speed(bench: Bench) -> None:
    """P4M, dense, fused and Fourier, beside the plain network of the same channels: cnn_flops."""
    torch._dynamo.config.recompile_limit = 64  # all networks share the code of one class
    if bench.gpu:  # by default as many images at a time as fit a CPU's cache
        gfourier.CHUNK = 1 << 26
    for compiled in (False, True):
        for fields in bench.s.fields:
            race(bench, fields, compiled)
            bench.release()


def race(bench: Bench, fields: tuple[int, ...], compiled: bool) -> None:
    mode = f"{'/'.join(map(str, fields))} fields, {'compiled' if compiled else 'eager'}"
    kinds = ("plain", "dense") if compiled else ("plain", "dense", "auto", "fourier")
    names = [f"{mode}, {name}" for name in kinds]
    made = {n: bench.attempt(n, Network, bench, n.split()[-1], fields, compiled) for n in names}
    networks = {name: network for name, network in made.items() if network}
    for phase in ("forward", "step"):
        times: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(bench.s.rounds):
            for name, network in networks.items():
                times[name].append(bench.seconds(getattr(network, phase), bench.s.calls))
        plain = times.get(names[0], [float("nan")] * bench.s.rounds)
        for name, taken in times.items():
            ratio = median(a / b for a, b in zip(taken, plain, strict=True))
            ms, net = 1000 * median(taken), networks[name]
            text = f"{ms:.2f} ms, {ratio:.2f} of plain"
            if phase == "step":
                text += f"; peak {net.peak:.1f} GiB, first calls {net.first:.0f} s"
            bench.add(f"{name}: {phase}", text, ms=ms, ratio=ratio, peak_gib=net.peak)


def clustering(bench: Bench) -> None:
    """As many rows as the paper's, of as many columns as the arms' features have."""
    n, k, d = bench.s.images, bench.s.k, bench.s.pca_dim
    randn = partial(torch.randn, device=bench.device)
    for arm, width in bench.s.arms.items():
        columns = width[-1]
        rows = randn(k, d)[torch.arange(n, device=bench.device) % k] + 0.7 * randn(n, d)
        rows = rows @ randn(d, columns) + 0.1 * randn(n, columns)
        whiten = PCAWhiten(d).fit(rows[: 2 * columns])  # libraries are loaded once
        white = bench.seconds(partial(whiten.fit_transform, rows))
        bench.add(f"PCA-whitening, {n:,} x {columns:,} to {d}", f"{white:.2f} s", seconds=white)
        points, model = whiten.transform(rows).cpu().numpy(), make_clusterer("kmeans", k, seed=0)
        with threadpool_limits(2):  # as in the loop
            took = bench.seconds(partial(model.fit, points))
        text = f"{took:.1f} s, {model.n_iter_} iterations"
        bench.add(f"K-means, {n:,} x {d}, K = {k}, 2 CPU threads", text, seconds=took)
        bench.cluster_seconds[arm] = white + took


def rates(bench: Bench) -> None:
    """The steps of an epoch of both arms, and what 20 epochs would take."""
    n, rows = bench.s.images, bench.s.batches * bench.s.batch
    images, configs = bench.loop(rows, bn_statistics="running")
    labels = torch.arange(rows).numpy() % bench.s.k
    for arm, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            loop = Training(images, config, Path(folder), World(device=bench.device), None)
        parts = (loop.model, [loop.body, loop.top], loop.images, labels, config)
        took = {"cluster": bench.cluster_seconds.get(arm, float("nan"))}
        for what, work in (("features", loop.extract), ("train", partial(train_epoch, *parts, 1))):
            work()
            seconds = median(bench.seconds(work) for _ in range(3))
            took[what] = seconds * n / rows
            bench.add(f"{arm}: {what}", f"{rows / seconds:,.0f} images/s", rate=rows / seconds)
        total = 20 * sum(took.values()) + took["features"] + took["cluster"]
        text = f"{total / 60:.1f} min; per epoch "
        text += ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items())
        bench.add(f"{arm}: 20 epochs of {n:,} images, projected", text, per_epoch=took)


def epoch(bench: Bench) -> None:
    """One epoch of both arms by `lib.deepcluster.fit`, from images to the files of a run."""
    n = bench.s.epoch_images
    images, configs = bench.loop(n, epochs=1)
    for arm, config in configs.items():
        bench.release()
        bench.look_at_the_clock()
        bench.peak()
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            row = fit(images, config, folder, progress=False).metrics.iloc[-1]
            took, peak = time.perf_counter() - begin, bench.peak()
        steps = {what: float(row[f"seconds_{what}"]) for what in ("features", "cluster", "train")}
        text = f"{took:.1f} s; " + ", ".join(f"{what} {s:.1f} s" for what, s in steps.items())
        text += f"; peak {peak:.1f} GiB; loss {row.loss:.2f}; {row.clusters_used:.0f} clusters"
        bench.add(f"{arm}: 1 epoch of {n:,} phantoms", text, seconds=took, peak_gib=peak, **steps)


# minutes of eight; what a part leaves over is the next one's
PARTS = {numbers: 0.6, speed: 3.6, clustering: 1.2, rates: 1.0, epoch: 1.6}


def write(bench: Bench, place: str) -> None:
    """gpu.json and gpu.md, after every part: a killed run leaves what it has."""
    out, report = bench.options.out, {"where": place, "sizes": vars(bench.s), "rows": bench.rows}
    lines = [f"{place}.", f"Batch {bench.s.batch}, bf16, channels-last.", ""]
    lines += ["| part | what | result |", "|---|---|---|"]
    lines += [f"| {row['part']} | {row['what']} | {row['result']} |" for row in bench.rows]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --tiny --device cpu tries this script without one")
    bench = Bench(options)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    card = torch.cuda.get_device_name() if bench.gpu else f"{platform.machine()} CPU"
    place = f"{card}, PyTorch {torch.__version__}, torch.compile by {options.backend}"
    place += f", {date.today()}, commit {commit or 'not known'}"
    print(place)
    for number, (work, minutes) in enumerate(PARTS.items(), 1):
        bench.part = f"{number} {work.__name__}"
        print(bench.part, flush=True)
        bench.until += 60 * minutes * options.minutes / 8
        try:
            bench.attempt("the rest", work, bench)
        except OutOfTime:
            bench.add("the rest", "no time left")
        bench.release()
        write(bench, place)
    return int(bench.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
