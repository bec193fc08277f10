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
     ("H100-SXM", "H100 SXM"), ("h100", "H100 SXM"), ("l40s", "L40S"), ("RTX_4090", "RTX 4090"),
     ("A100 (80 GB)", "A100 80GB"), (" H200 ", "H200")],
)  # fmt: skip
def test_kinds_are_found(asked: str, name: str) -> None:
    assert gpus.find(asked).name == name


@pytest.mark.parametrize(
    "asked",
    ["", "-", "H", "B", "TPU v5p", "B3000", "H20", "L4", "L40", "A10", "A100 40GB", "A100 8",
     "H100 NVL", "H100 PCIe", "GH200", "RTX", "RTX 409"],
)  # fmt: skip
def test_other_names_are_refused(asked: str) -> None:
    """Among them real GPUs that begin, or are begun, like a kind that is here."""
    with pytest.raises(BadValue) as error:
        gpus.find(asked)
    names = "A100 80GB, H100 SXM, H200, B200, B300, RTX 4090, L40S"
    assert str(error.value) == f"gpu is {asked!r}; it must be one of {names}."


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_name_and_its_short_form_are_one_kinds(kind: GPU) -> None:
    assert gpus.find(kind.name) == gpus.find(gpus._short(kind)) == kind


def test_a_kind_has_something_of_everything() -> None:
    values = {f: getattr(KINDS["B300"], f) for f in GPU.__dataclass_fields__}
    with pytest.raises(BadValue, match="bandwidth is 0.0; it must be above zero"):
        GPU(**{**values, "bandwidth": 0})
