"""The row kernels of CUDA, interpreted: the torch backend with them against without them."""

import pytest
import torch
from torch import Tensor

from trinity_lib import dropless, fused


def case(T: int, E: int, K: int, D: int, F: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(T + E + K)
    weights = [torch.randn(E, F, D, generator=generator) * D**-0.5 for _ in range(3)]
    x = torch.randn(T, D, generator=generator)
    ranking_TE = torch.rand(T, E, generator=generator)
    ranking_TE[:, 0] += 0.5
    ranking_TE[:, -1] = -1.0  # idle, unless all are chosen
    return x, *weights, ranking_TE.topk(K).indices, torch.rand(T, K, generator=generator)


@pytest.mark.parametrize(
    "shape", [(33, 6, 2, 16, 8), (9, 5, 5, 24, 12), (1, 4, 1, 8, 4), (20, 3, 2, 1032, 1100)]
)
def test_one_pass_is_the_same_function(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for one_pass in (False, True):
        monkeypatch.setattr(dropless, "_one_pass", lambda x, answer=one_pass: answer)
        x, gate, up, down, picks, weights = case(*shape)
        leaves = [t.requires_grad_() for t in (x, gate, up, down, weights)]
        y = dropless.forward(x, gate, up, down, picks, weights)[0]
        slope = torch.arange(y.numel(), dtype=torch.float32).view_as(y).cos()
        results.append([y, *torch.autograd.grad((y * slope).sum(), leaves)])
    for plain, one in zip(*results, strict=True):
        torch.testing.assert_close(one, plain, atol=2e-6, rtol=1e-5)
    assert not results[1][2][-1].any() or shape[1] == shape[2]


def test_every_kernel_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(3000, generator=generator)
    assert torch.equal(fused.invert(order)[order], torch.arange(3000))
    x = torch.randn(1500, 5, generator=generator)
    assert torch.equal(fused.gather(x, order, 2), x[order // 2])
    y, other = torch.randn(2, 3000, 5, generator=generator)
    weights = torch.rand(1500, 2, generator=generator)
    inverse = fused.invert(order)
    expected = (y[inverse].view(1500, 2, 5) * weights[..., None]).sum(1)
    torch.testing.assert_close(fused.combine(y, inverse, 2, weights), expected)
    expected = (y + other)[inverse].view(1500, 2, 5).sum(1)
    torch.testing.assert_close(fused.combine(y, inverse, 2, other_RD=other), expected)


def test_the_kernels_keep_a_nan() -> None:
    gate = torch.tensor([[torch.nan, 1.0, -80.0, 80.0]])
    hidden = fused.swiglu(gate, torch.ones(1, 4))
    assert hidden[0, 0].isnan() and hidden[0, 1:].isfinite().all()
    assert abs(hidden[0, 2]) < 1e-30 and hidden[0, 3] == 80
