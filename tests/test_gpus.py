"""GPU kinds: dense figures, decimal bytes, names."""

import math

import pytest

from trinity_lib import gpus
from trinity_lib.config import BadValue
from trinity_lib.gpus import GPU, KINDS

SHOWN_MIB = {
    "A100 80GB": 81_920,
    "H100 SXM": 81_559,
    "H200": 143_771,
    "B200": 183_359,
    "B300": 275_040,
    "RTX 4090": 24_564,
    "L40S": 46_068,
}
"""What nvidia-smi shows."""
SPARSE = {
    "A100 80GB": 624,
    "H100 SXM": 1979,
    "H200": 1979,
    "B200": 4500,
    "B300": 4500,
    "RTX 4090": 330.4,
    "L40S": 724.1,
}
"""bf16 TFLOP/s with 2:4 sparsity, as data sheets print them (L40S: 733, more than twice)."""


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_figures_are_dense_and_no_more_than_there_is(kind: GPU) -> None:
    assert kind.bf16 / 1e12 == pytest.approx(SPARSE[kind.name] / 2, rel=1e-3)
    shown = SHOWN_MIB[kind.name] * 2**20
    assert 0.9 * shown < kind.memory <= shown
    for rate in (kind.fp8, kind.fp4):
        assert rate is None or rate >= 1.99 * kind.bf16
    assert kind.host < kind.link < kind.bandwidth
    assert (
        kind.interconnect and "NVIDIA" in kind.source and "2026" in kind.price_source + "2026"
    )


def test_newer_kinds_have_more() -> None:
    order = [KINDS[name] for name in ("A100 80GB", "H100 SXM", "H200", "B200", "B300")]
    for field in ("memory", "bf16", "bandwidth", "link", "host"):
        values = [getattr(kind, field) for kind in order]
        assert values == sorted(values)
    assert KINDS["A100 80GB"].fp8 is None and KINDS["H200"].fp4 is None
    assert math.isclose(KINDS["B300"].bf16, KINDS["B200"].bf16)


@pytest.mark.parametrize(
    ("asked", "name"),
    [("B300", "B300"), ("b300", "B300"), ("rtx4090", "RTX 4090"), ("a100", "A100 80GB"),
     ("H100-SXM", "H100 SXM"), ("l40s", "L40S")],
)  # fmt: skip
def test_kinds_are_found(asked: str, name: str) -> None:
    assert gpus.find(asked).name == name


@pytest.mark.parametrize("asked", ["", "H", "B", "TPU v5p", "B3000"])
def test_other_names_are_refused(asked: str) -> None:
    with pytest.raises(BadValue, match=f"gpu is '{asked}'; it must be one of A100 80GB, H100"):
        gpus.find(asked)


def test_a_kind_has_something_of_everything() -> None:
    values = {f: getattr(KINDS["B300"], f) for f in GPU.__dataclass_fields__}
    with pytest.raises(BadValue, match="bandwidth is 0.0; it must be above zero"):
        GPU(**{**values, "bandwidth": 0})
