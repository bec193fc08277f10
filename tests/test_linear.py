"""Products of few rows through the C++ operator against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib.linear import Linear, products, project


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 70), st.lists(st.integers(1, 90), min_size=1, max_size=4)
)
def test_few_rows_are_the_same_products(rows: int, width: int, fans: list[int]) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, 1, width, generator=generator)
    matrices = [torch.randn(fan, width, generator=generator) for fan in fans]
    with torch.no_grad():
        results = products(x, *matrices)
    for result, matrix in zip(results, matrices, strict=True):
        assert result.shape == (rows, 1, len(matrix))
        torch.testing.assert_close(result, x @ matrix.T, atol=1e-4, rtol=1e-5)


def test_the_operator_is_used_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.ops.trinity_native.few_rows
    monkeypatch.setattr(
        torch.ops.trinity_native, "few_rows", lambda *a: calls.append(len(a[1])) or real(*a)
    )
    layers = [Linear(6, 4), Linear(6, 5)]
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
    x = torch.ones(8, 6)
    with torch.no_grad():
        project(x, *layers)
        assert calls == [2]
        project(torch.ones(9, 6), *layers)  # too many rows
        project(x.double(), *(layer.double() for layer in layers))
    assert calls == [2]
    layers = [layer.float() for layer in layers]
    assert project(x, *layers)[0].requires_grad and calls == [2]
    layers[0].native = False
    with torch.no_grad():
        project(x, *layers)
    assert calls == [2]


def test_a_bias_is_added() -> None:
    layer = Linear(3, 2, bias=True)
    torch.nn.init.ones_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
        assert layer(torch.ones(1, 3)).tolist() == [[4.0, 2.0]]
