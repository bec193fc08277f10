"""Tensors that pass for CUDA's: what they say, what stands in, and what is set aside."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from trinity_lib import guise
from trinity_lib.guise import Guise
from trinity_lib.muon import orthogonalise

EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
B, H, S, P, C = 2, 3, 5, 8, 4


class Dispatched(TorchDispatchMode):
    """Which operators are dispatched, with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func._overloadpacket, args, result))
        return result


def kept(compute: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what autograd saves."""
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        compute()
    return [(tuple(t.shape), t.dtype) for t in tensors]


def test_tensors_say_that_they_are_cudas_while_it_is_active() -> None:
    tensor, parameter = torch.empty(1), torch.nn.Parameter(torch.empty(1))
    with Guise():
        assert tensor.is_cuda and parameter.is_cuda and torch.empty(2).is_cuda
        assert tensor.device.type == "cpu"
        with FakeTensorMode():
            assert torch.empty(1).is_cuda
    assert not tensor.is_cuda and not parameter.is_cuda


def test_all_else_is_computed_as_ever() -> None:
    x, w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.eye(6)
    expected = [F.linear(x, w), x.softmax(-1), x.sum(0, keepdim=True), torch.cat([x, x])]
    with Guise():
        found = [F.linear(x, w), x.softmax(-1), x.sum(0, keepdim=True), torch.cat([x, x])]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_is_set_aside_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Guise():
        raise ZeroDivisionError
    assert not torch.empty(1).is_cuda


def test_muon_orthogonalises_in_bf16_and_gives_back_fp32() -> None:
    with Dispatched() as seen, Guise():
        result = orthogonalise(torch.eye(3), 1)
    assert result.dtype == torch.float32
    products = [out for operator, _, out in seen.calls if operator is torch.ops.aten.mm]
    assert products and all(p.dtype == torch.bfloat16 for p in products)


def test_a_norm_keeps_its_input_its_gain_and_a_root_a_row() -> None:
    with FakeTensorMode(), Guise():
        x, gain = torch.empty(2, 5, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        found = kept(lambda: F.rms_norm(x, (8,), gain, 1e-5))
        y = F.rms_norm(x, (8,), gain, 1e-5)
        guise.backward(y.sum())
        assert y.shape == x.shape and y.dtype == x.dtype
        assert x.grad is not None and x.grad.shape == x.shape
        assert gain.grad is not None and gain.grad.shape == gain.shape
    fp32 = torch.float32
    assert found == [((2, 5, 8), fp32), ((8,), fp32), ((2, 5, 1), fp32)]


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, and which keys are seen."""
    q = torch.empty(B, H, S, C, dtype=dtype, requires_grad=True)
    k, v = (torch.empty(B, H, P, C, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v, torch.ones(B, 1, S, P, dtype=torch.bool)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_is_the_kernel_that_takes_a_bias(autocast: bool) -> None:
    dtype = torch.bfloat16 if autocast else torch.float32
    with FakeTensorMode(), Guise(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        q, k, v, mask = qkv()
        with Dispatched() as seen:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=False)
        assert y.shape == (B, H, S, C) and y.dtype == dtype
        ((_, args, _),) = (call for call in seen.calls if call[0] is EFFICIENT)
        given, bias = args[:3], args[3]
        assert all(x.dtype == dtype for x in (*given, bias))
        assert bias.shape == (B, H, S, P) and args[4] is True  # the log-sums are kept
        assert bias.untyped_storage().nbytes() == B * S * P * dtype.itemsize  # for all heads
        guise.backward(y.float().sum())
        for x in (q, k, v):
            assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == x.dtype


def test_attention_keeps_inputs_bias_output_and_log_sums() -> None:
    with FakeTensorMode(), Guise():
        q, k, v, mask = qkv()
        found = kept(
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=False)
        )
    shapes = sorted(shape for shape, _ in found if len(shape) > 2)
    sums = [shape for shape in shapes if shape[:2] == (B, H) and len(shape) == 3]
    assert len(sums) == 1 and sums[0][2] >= S
    for shape, times in (((B, H, S, C), 2), ((B, H, P, C), 2), ((B, H, S, P), 1)):
        assert shapes.count(shape) == times, shape


def test_shared_heads_are_not_cudas() -> None:
    with FakeTensorMode(), Guise():
        q, k, v, mask = qkv()
        with pytest.raises(AssertionError, match="no shared heads"):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_backward_gives_torchs_gradients() -> None:
    def parameters() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(4, 4, generator=generator).requires_grad_() for _ in range(2)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).tanh().pow(2).mean()

    ours, theirs = parameters(), parameters()
    loss(*theirs).backward()
    with Guise():
        guise.backward(loss(*ours))
        guise.backward(loss(*ours))  # gradients are added
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.grad is not None and its.grad is not None
        torch.testing.assert_close(mine.grad, 2 * its.grad)


def test_the_guise_is_still_there_in_backward() -> None:
    """Where recomputed blocks ask again what they are."""
    said: list[bool] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            said.append(dy.is_cuda)
            return dy

    x = torch.ones(2, requires_grad=True)
    with Guise():
        guise.backward(Asks.apply(x).sum())
    assert said == [True]
