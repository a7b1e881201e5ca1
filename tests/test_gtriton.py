"""A GPU's kernels against the modules they stand for: on a GPU, else by Triton's interpreter."""

import copy

import pytest
import torch
from torch import nn

from lib import fast
from lib.gconv import GroupBlock, P4ConvP4, P4MConvP4M, P4MConvZ2
from tests.test_fast import close, outcome
from tests.test_gconv import block, make_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gtriton = fast.gtriton
pytestmark = pytest.mark.skipif(gtriton is None, reason="Triton comes with PyTorch for CUDA")


class Fused(GroupBlock):
    """A block that takes the kernels on any device."""

    def forward(self, x):
        y, statistics = gtriton.block(self[0], self[1], x)
        if self[1].training:
            fast.track(self[1], statistics)
        return y


CASES = [(P4MConvZ2, 1, 9, (8, 8)), (P4MConvP4M, 3, 17, (7, 10)), (P4ConvP4, 2, 5, (5, 4))]


def pair(layer, channels, fields, momentum=0.1):
    """A fused block and the same in double precision."""
    torch.manual_seed(0)
    ours = Fused(*block(layer.lifting, layer.group, channels, fields, 3)).to(DEVICE)
    ours[1].momentum = momentum
    exact = GroupBlock(*copy.deepcopy(ours)).double()
    exact[0].algorithm = "dense"
    return ours, exact


@pytest.mark.parametrize(("layer", "channels", "fields", "size"), CASES)
def test_a_block_is_its_modules(layer, channels, fields, size):
    ours, exact = pair(layer, channels, fields)
    x = make_input(ours[0], 3, *size, torch.float32).to(DEVICE)
    found = outcome(ours, x)
    for name, expected in outcome(exact, x.double()).items():
        close(found[name], expected, 1e-5)
    found = outcome(ours.eval(), x, gradient=False)
    close(found["y"], outcome(exact.eval(), x.double(), gradient=False)["y"], 1e-5)


def test_statistics_beside_a_large_mean():
    """The mean is a thousand times the standard deviation; a cumulative average."""
    ours, exact = pair(P4MConvP4M, 2, 4, momentum=None)
    for _ in range(2):
        x = torch.randn(2, 2, 8, 6, 6, device=DEVICE) + 1e3
        outcome(ours, x, gradient=False), outcome(exact, x.double(), gradient=False)
    close(ours[1].running_mean, exact[1].running_mean, 1e-5)
    close(ours[1].running_var, exact[1].running_var, 1e-2)


def test_the_gradient_of_a_gradient_names_the_dense_way():
    ours, _ = pair(P4MConvZ2, 1, 3)
    x = torch.randn(2, 1, 6, 6, device=DEVICE, requires_grad=True)
    with pytest.raises(NotImplementedError, match="dense"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_when_a_block_on_a_gpu_is_fused(monkeypatch):
    taken = []
    original = gtriton.block
    monkeypatch.setattr(gtriton, "block", lambda *a: (taken.append(1), original(*a))[1])
    module, x = block(False, P4MConvP4M.group, 4, 8, 3).cuda(), torch.randn(2, 4, 8, 9, 9).cuda()
    module(x)
    with torch.no_grad():
        module.eval()(x)
    assert len(taken) == 2
    module(x)  # the pool alone has no gradient
    module.train()[0].algorithm = "dense"
    module(x)
    module[0].algorithm, module[1] = "auto", nn.SyncBatchNorm(8).cuda().eval()
    module(x)
    assert len(taken) == 2
