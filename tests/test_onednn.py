"""Products through oneDNN against torch's own, with their gradients."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from trinity_lib import onednn
from trinity_lib.attention import AttentionConfig
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.routing import RouterConfig

pytestmark = pytest.mark.skipif(not onednn.AVAILABLE, reason="torch was built without oneDNN")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(deadline=None, max_examples=30)
@given(*[st.integers(1, 70)] * 3, st.booleans())
def test_products_and_gradients_are_those_of_float64(
    rows: int, width: int, fan: int, turned: bool
) -> None:
    x = normal(width, rows).t() if turned else normal(rows, width)
    matrix, d = normal(fan, width), normal(rows, fan)
    mine = [x.requires_grad_(), matrix.requires_grad_()]
    exact = [part.detach().double().requires_grad_() for part in mine]
    y, expected = torch.ops.trinity.product(*mine), exact[0] @ exact[1].t()
    torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
    for found, right in zip(
        torch.autograd.grad(y, mine, d),
        torch.autograd.grad(expected, exact, d.double()),
        strict=True,
    ):
        assert found.shape == right.shape
        torch.testing.assert_close(found, right.float(), atol=2e-5, rtol=1e-5)


def test_large_fp32_products_go_through_it() -> None:
    x, matrix = normal(2, 64, 256), normal(128, 256)
    assert onednn.takes(x, matrix) and not onednn.takes(x[:, :63], matrix)
    assert not onednn.takes(x.double(), matrix.double())
    assert not onednn.takes(x.bfloat16(), matrix)
    assert not onednn.takes(x.to("meta"), matrix.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.takes(x, matrix)
        assert onednn.linear(x, matrix).dtype == torch.bfloat16
    y = onednn.linear(x.requires_grad_(), matrix)
    assert y.shape == (2, 64, 128) and "product" in repr(y.grad_fn.next_functions[0][0])
    torch.testing.assert_close(y, nn.functional.linear(x, matrix), atol=1e-4, rtol=1e-5)


def test_the_operator_is_sound() -> None:
    """Fake shapes and strides, autograd's registration, and compilation."""
    for a, b in ((normal(9, 5), normal(7, 5)), (normal(5, 9).t(), normal(5, 7).t())):
        opcheck(torch.ops.trinity.product, (a.requires_grad_(), b.requires_grad_()))


def test_only_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = normal(128, 256), normal(128, 256).requires_grad_()
    y, calls = onednn.linear(x, matrix), []
    real = torch.ops.trinity.product
    monkeypatch.setattr(
        torch.ops.trinity, "product", lambda *pair: calls.append(pair) or real(*pair)
    )
    y.sum().backward()
    assert len(calls) == 1 and matrix.grad is not None


def test_what_computes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onednn.what("cpu", torch.float32).startswith("oneDNN")
    assert onednn.what("cuda", torch.bfloat16) == "torch's choice"
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    assert "does not offer" in onednn.what("cpu", torch.float32)
    assert not onednn.takes(normal(128, 256), normal(128, 256))


def test_it_can_be_switched_off_and_torch_speaks_of_bad_shapes() -> None:
    x, matrix = normal(256, 256), normal(256, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: this is no Intel GPU
        with torch.backends.mkldnn.flags(enabled=False):
            assert not onednn.takes(x, matrix)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        onednn.linear(x, matrix[:, 1:])
    assert onednn.linear(normal(512, 16384), normal(16384)).shape == (512,)


def test_only_what_gradients_need_is_kept() -> None:
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    )
    x, matrix = normal(512, 256), normal(128, 256)
    with hooks:
        onednn.linear(x.clone().requires_grad_(), matrix)
        assert kept == [matrix.numel()]
        onednn.linear(x, matrix.clone().requires_grad_())
    assert kept == [matrix.numel(), x.numel()]


def test_a_models_large_products_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections, router, dense layer and head, tied or not; the lens says the same."""
    config = ModelConfig(
        vocab_size=300, width=64, num_layers=2, num_dense_layers=1, dense_width=160,
        expert_width=16, router=RouterConfig(num_experts=80, top_k=2),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16, window=8),
    )  # fmt: skip
    rows, real = [], torch.ops.trinity.product
    monkeypatch.setattr(
        torch.ops.trinity, "product", lambda *pair: rows.append(len(pair[1])) or real(*pair)
    )
    monkeypatch.setattr(onednn, "LEAST", 2**17)
    for tied in (False, True):
        model = Trinity(dataclasses.replace(config, tied=tied))
        model.initialise(torch.Generator().manual_seed(0))
        rows.clear()
        model(torch.arange(64).view(2, 32)).logits.sum().backward()
        forward = [64] * 5 + [160, 160, 64] + [64] * 5 + [80] + [300]
        assert rows[: len(forward)] == forward
        assert len(rows) == 3 * len(forward)
