"""Two processes compute what one does, child processes are looked after, and memory."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from lib import parallel
from lib.parallel import ProcessFailed, resolve_device, run_process, run_processes
from lib.paths import ROOT

TWO = """
    import os, socket, sys
    import numpy as np, torch
    from torch import nn
    from lib.deepcluster import TrainConfig, fit
    from lib.gconv import GroupBatchNorm
    from lib.parallel import join, share_batch_norm
    from tests.test_deepcluster import pictures
    torch.set_num_threads(1)
    folder, size = sys.argv[1], 2 if os.fork() else 1  # beside each other
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rank = 0 if size == 1 or os.fork() else 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    found = {}
    with join("cpu", timeout=60) as world:
        assert world.size == size
        generator = torch.Generator().manual_seed(0)
        for momentum in (0.1, None):
            x = torch.randn(7, 2, 8, 3, 3, generator=generator, dtype=torch.float64) * 2 + 5
            up = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            norm = GroupBatchNorm(2, momentum=momentum).double()
            nn.init.uniform_(norm.weight, generator=generator)
            shared = share_batch_norm(nn.Sequential(norm), world)[0]
            rows = world.share(7)
            mine = x[rows].clone().requires_grad_()
            y = shared(mine)
            (y * up[rows]).sum().backward()
            world.sum_gradients(shared.parameters())
            parts = {"y": y.detach().flatten(1), "dx": mine.grad.flatten(1)}
            found |= {f"{k} {momentum}": world.gather(v.numpy(), 7) for k, v in parts.items()}
            parts = {"dw": shared.weight.grad, "db": shared.bias.grad, **dict(norm.named_buffers())}
            found |= {f"{k} {momentum}": v.numpy() for k, v in parts.items() if "num" not in k}
        labels = world.broadcast(np.arange(5) if world.main else None, 5)
        assert labels.tolist() == [0, 1, 2, 3, 4]
        if world.main:
            np.savez(f"{folder}/{size}.npz", **found)
    os.environ["MASTER_PORT"] = str(port + 1)
    config = TrainConfig("p4m", 4, 4, 2, 32, lr=1e-4, width=(2, 2, 4), device="cpu")
    fit(pictures(100), config, f"{folder}/run{size}", progress=False)
    if rank == 0 and size == 2:
        for _ in range(2):  # the other one of this world, and the world of one
            assert os.wait()[1] == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_two_processes_compute_what_one_does(tmp_path):
    """To rounding; dropout draws other masks, so a network without it."""
    command = [sys.executable, "-c", textwrap.dedent(TWO), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / f"{size}.npz") for size in (1, 2))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-9, atol=1e-9, err_msg=name)
    one, two = (np.load(tmp_path / f"run{size}" / "features.npy") for size in (1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-3)


def test_shares_cover_all_rows_once_and_a_device_that_is_absent_is_named(monkeypatch):
    for n, size in ((7, 3), (2, 4), (100, 1)):
        shares = [parallel.World(rank, size).share(n) for rank in range(size)]
        assert [i for share in shares for i in range(n)[share]] == list(range(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(RuntimeError, match="cuda"):
        resolve_device("cuda")


def test_a_process_that_fails_gives_status_and_last_lines(tmp_path, capsys):
    code = "import sys; print('caf\\u00e9'); sys.stdout.buffer.write(b'\\xff'); sys.exit(3)"
    with pytest.raises(ProcessFailed) as caught:
        run_process([sys.executable, "-c", code], log=tmp_path / "log", echo=True)
    assert caught.value.status == 3
    assert "café" in caught.value.tail
    assert "café" in (tmp_path / "log").read_text(encoding="utf-8")
    assert "café" in capsys.readouterr().err


def test_processes_share_the_cores_and_one_that_fails_stops_no_other(tmp_path):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit({})"
    jobs = {str(k): [sys.executable, "-c", code.format(int(k == 1))] for k in range(4)}
    ended = {}
    run_processes(jobs, 2, lambda name: tmp_path / name, ended.__setitem__)
    assert {name for name in jobs if ended[name] is not None} == {"1"}
    assert (tmp_path / "0").read_text().strip() == str(max(1, parallel.cores() // 2))


def test_the_memory_that_is_allowed(tmp_path, monkeypatch):
    monkeypatch.delenv("MEM_LIMIT", raising=False)
    own, machine = tmp_path / "own", parallel.memory("/nowhere", "/nowhere")
    assert machine >= 2**30
    for text, limit, group in (
        ("0::/a/b\n", "memory.max", "a"),  # version 2, a limit of the group above
        ("9:cpu:/\n4:memory:/a/b\n", "memory.limit_in_bytes", "memory/a/b"),
        ("4:memory:/elsewhere\n", "memory.limit_in_bytes", "memory"),  # a container sees its own
    ):
        own.write_text(text)
        folder = tmp_path / text[:1] / text[-4:-1].strip("/") / "groups"
        (folder / group).mkdir(parents=True)
        (folder / group / limit).write_text("max\n")
        assert parallel.memory(str(folder), str(own)) == machine
        (folder / group / limit).write_text("900000000\n")
        assert parallel.memory(str(folder), str(own)) == 900_000_000
    monkeypatch.setenv("MEM_LIMIT", "1000")
    assert parallel.memory(str(folder), str(own)) == 1000
