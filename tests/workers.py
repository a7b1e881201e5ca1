"""Work for processes that tests start: ``python -m tests.workers kill|ranks FOLDER``. It forks, so
that PyTorch is imported once.

Nothing is computed before a fork: threads do not survive one.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib import parallel as distributed
from lib.deepcluster import TrainConfig, cluster, fit
from lib.gconv import GroupBatchNorm
from tests.test_deepcluster import SMALL, pictures

KILLS = 20
KILLED = dataclasses.replace(SMALL, epochs=4)
CLUSTERED = TrainConfig("alexnet", 6, 5, kmeans_engine="torch", device="cpu")
ARMS = {
    "alexnet": TrainConfig(
        "alexnet",
        4,
        3,
        2,
        42,
        width=(8, 16, 16, 16, 16, 64),
        rotation_degrees=180,
        kmeans_engine="torch",
        device="cpu",
    ),
    "p4m": TrainConfig("p4m", 4, 3, 2, 42, width=(2, 4, 8), kmeans_engine="torch", device="cpu"),
}


def forked(work, *args):
    """Process id of a child that does `work` and ends."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid):
    """Exit status, or minus the signal, of a child when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(folder):
    """An unbroken run, then `KILLS` runs that are killed at moments spread over its length and
    resumed.
    """

    def train(name):
        fit(pictures(), KILLED, folder / name / "run", progress=False)

    assert ended(forked(train, "warm")) == 0
    begin = time.monotonic()
    assert ended(forked(train, "unbroken")) == 0
    length = time.monotonic() - begin
    rng = np.random.default_rng(0)
    killed = []
    for k in range(KILLS):
        name, moment, signalled = f"killed{k}", length * (k + rng.random()) / KILLS, False
        while (
            not signalled
        ):  # one that was done before its moment is begun anew, and killed earlier
            shutil.rmtree(folder / name, ignore_errors=True)
            pid = forked(train, name)
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            signalled, moment = ended(pid) == -signal.SIGKILL, 0.8 * moment
        table = folder / name / "run" / "metrics.csv"
        killed.append(len(table.read_text().splitlines()) - 1 if table.exists() else 0)
        assert ended(forked(train, name)) == 0, (
            f"run {k} did not go on, killed after {killed[-1]} epochs"
        )
    (folder / "killed.json").write_text(json.dumps(killed))


def ranks(folder):
    """What two processes compute, and what one does, into `folder`."""

    def layers(world):
        """Batch norm and dropout on shares of a batch of unequal length, beside PyTorch's own on
        the whole batch.
        """
        generator = torch.Generator().manual_seed(0)
        found = {}
        for name, norm, shape in (
            ("2d", nn.BatchNorm2d(3), (7, 3, 4, 4)),
            ("group", GroupBatchNorm(2), (7, 2, 8, 3, 3)),
        ):
            x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 5
            up = torch.randn(shape, generator=generator, dtype=torch.float64)
            norm = norm.double()
            nn.init.uniform_(norm.weight, generator=generator)
            shared = distributed.share_layers(nn.Sequential(norm), world)[0]
            assert isinstance(shared, distributed.SharedBatchNorm) == (world.size > 1)
            rows = world.share_of_batch(len(x))
            mine = x[rows].clone().requires_grad_()
            y = shared(mine)
            (y * up[rows]).sum().backward()
            world.sum_gradients(shared.parameters())
            tensors = {
                "y": world.all_rows(y.detach(), 7),
                "dx": world.all_rows(mine.grad, 7),
                "dw": shared.weight.grad,
                "db": shared.bias.grad,
            }
            found |= {
                f"{name} {key}": value.numpy()
                for key, value in {**tensors, **dict(shared.named_buffers())}.items()
            }
            found[f"{name} eval"] = shared.eval()(x).detach().numpy()
        dropout = distributed.share_layers(nn.Sequential(nn.Dropout(0.3)), world)[0]
        torch.manual_seed(3)
        x = torch.arange(70.0).reshape(7, 10)
        for step in range(2):
            found[f"dropout {step}"] = world.all_rows(
                dropout(x[world.share_of_batch(7)]), 7
            ).numpy()
        found["dropout eval"] = dropout.eval()(x).numpy()
        return found

    def work(size):
        with distributed.join("cpu", timeout=60) as world:
            assert world.size == size
            found = layers(world)
            features = (
                np.random.default_rng(1).normal(size=(301, 9)).astype(np.float32)
                + 3 * np.eye(9, dtype=np.float32)[np.arange(301) % 6]
            )
            found["assignments"] = cluster(features[world.share(301)], CLUSTERED, 1, world)[0]
            collected = world.collect(features[world.share(301)], 301, rows=40)
            assert (collected is None) == (not world.main)
            if world.main:
                assert np.array_equal(collected, features)
                np.savez(folder / f"layers{size}.npz", **found)
            if world.rank == size - 1:
                np.savez(folder / f"last{size}.npz", **found)
            try:
                world.check_equal(world.rank, "their number")
            except RuntimeError as error:
                (folder / f"unequal{world.rank}.txt").write_text(str(error))
        for arm, config in ARMS.items():
            environment_of(world.rank, size)  # a new port would do; the old is free again
            fit(pictures(200), config, folder / f"{arm}{size}" / "run", progress=False, timeout=60)

    def waiting(rank):
        with distributed.join("cpu", timeout=2) as world:
            world.barrier()
            if rank == 1:
                time.sleep(30)
            try:
                world.barrier()
            except RuntimeError as error:
                (folder / "timeout.txt").write_text(str(error))
                raise

    def environment_of(rank, size):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))

    def started(rank, size, function, argument):
        environment_of(rank, size)
        function(argument)

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    one = forked(started, 0, 1, work, 1)
    assert ended(one) == 0
    two = [forked(started, rank, 2, work, 2) for rank in range(2)]
    assert [ended(pid) for pid in two] == [0, 0]
    os.environ["MASTER_PORT"] = str(free_port())
    begin = time.monotonic()
    pids = [forked(started, rank, 2, waiting, rank) for rank in range(2)]
    assert ended(pids[0]) != 0
    (folder / "waited.txt").write_text(str(time.monotonic() - begin))
    os.kill(pids[1], signal.SIGKILL)
    ended(pids[1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    {"kill": kill, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
