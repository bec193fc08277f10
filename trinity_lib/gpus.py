"""GPU kinds by their vendor's published figures: memory, speed, links, and a price to assume.

NVIDIA prints tensor-core rates with 2:4 sparsity, which training cannot use; every rate here
is dense, half of those (RTX 4090: with sums in fp32). "GB" is read as 10^9 bytes: never more
than the driver shows (in MiB: A100 81,920, H200 143,771, B200 183,359, B300 275,040, L40S
46,068). Links are quoted both ways together. All from the pages named under `source`, read
in public copies of them in November 2026.
"""

from dataclasses import dataclass

from trinity_lib.config import BadValue, check, require

GB, TERA = 10**9, 1e12


@dataclass(frozen=True, kw_only=True)
class GPU:
    """What a kind of GPU can do at most."""

    name: str
    """What figures call it."""
    memory: int
    """Memory, bytes."""
    bf16: float
    """Dense bf16 matrix products, FLOP/s."""
    fp8: float | None = None
    """Dense fp8 matrix products, FLOP/s; None where the kind has none."""
    fp4: float | None = None
    """Dense fp4 matrix products, FLOP/s; None where the kind has none."""
    bandwidth: float
    """Of its memory, bytes per second."""
    link: float
    """To the other GPUs of its machine, bytes per second, both ways together."""
    interconnect: str
    """What that link is."""
    host: float
    """From the host's memory (PCIe x16), bytes per second, one way."""
    price: float
    """Dollars per GPU-hour where none is given: a list price, on demand, spring 2026."""
    source: str
    """Where the vendor publishes this."""
    price_source: str
    """Whose price."""

    def __post_init__(self) -> None:
        check(self)
        for field in ("memory", "bf16", "bandwidth", "link", "host", "price"):
            require(getattr(self, field) > 0, field, getattr(self, field), "above zero")


_NVLINK = "NVLink {} through NVSwitch"
_HGX = "NVIDIA HGX specifications (nvidia.com/en-us/data-center/hgx), of eight GPUs"
_ALL = (
    GPU(
        name="A100 80GB",
        memory=80 * GB,
        bf16=312 * TERA,
        bandwidth=2.039e12,
        link=600e9,
        interconnect=_NVLINK.format(3),
        host=32e9,
        price=2.41,
        source="NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4), SXM",
        price_source="signwl.com GPU market report, March 2026, mean",
    ),
    GPU(
        name="H100 SXM",
        memory=80 * GB,
        bf16=989.4 * TERA,
        fp8=1978.9 * TERA,
        bandwidth=3.35e12,
        link=900e9,
        interconnect=_NVLINK.format(4),
        host=64e9,
        price=2.95,
        source="NVIDIA H100 architecture whitepaper, SXM5 (gtc22-whitepaper-hopper)",
        price_source="aimultiple.com GPU index, May 2026, median",
    ),
    GPU(
        name="H200",
        memory=141 * GB,
        bf16=989.4 * TERA,
        fp8=1978.9 * TERA,
        bandwidth=4.8e12,
        link=900e9,
        interconnect=_NVLINK.format(4),
        host=64e9,
        price=4.54,
        source="NVIDIA H200 datasheet, SXM (nvidia.com/en-us/data-center/h200)",
        price_source="spheron.network, 17 March 2026",
    ),
    GPU(
        name="B200",
        memory=180 * GB,
        bf16=2250 * TERA,
        fp8=4500 * TERA,
        fp4=9000 * TERA,
        bandwidth=8e12,
        link=1.8e12,
        interconnect=_NVLINK.format(5),
        host=64e9,
        price=6.03,
        source=f"{_HGX}: 36 PFLOPS of sparse bf16, 1.4 TB",
        price_source="spheron.network, 17 March 2026",
    ),
    GPU(
        name="B300",
        memory=288 * GB,
        bf16=2250 * TERA,
        fp8=4500 * TERA,
        fp4=13_125 * TERA,
        bandwidth=8e12,
        link=1.8e12,
        interconnect=_NVLINK.format(5),
        host=128e9,
        price=6.03,
        source=f"{_HGX}: 36 PFLOPS of sparse bf16, 105 of dense fp4, 2.3 TB",
        price_source="assumed to be B200's; iforels.com asks 3.25 for five years",
    ),
    GPU(
        name="RTX 4090",
        memory=24 * GB,
        bf16=165.2 * TERA,
        fp8=330.3 * TERA,
        bandwidth=1.008e12,
        link=64e9,
        interconnect="PCIe 4.0 x16",
        host=32e9,
        price=0.60,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A",
        price_source="deploybase.ai on RunPod, March 2026",
    ),
    GPU(
        name="L40S",
        memory=48 * GB,
        bf16=362.05 * TERA,
        fp8=733 * TERA,
        bandwidth=864e9,
        link=64e9,
        interconnect="PCIe 4.0 x16",
        host=32e9,
        price=1.32,
        source="NVIDIA L40S datasheet (nvidia.com/en-us/data-center/l40s)",
        price_source="signwl.com GPU market report, March 2026, mean",
    ),
)
KINDS = {kind.name: kind for kind in _ALL}
"""Every kind by its name."""


def find(name: str) -> GPU:
    """The kind of that name, case and punctuation aside, or short for it ("A100", "H100").

    BadValue for any other: a beginning may be another GPU (H20, L4, A10) with other figures.
    """
    asked = _plain(name)
    for kind in _ALL:
        if asked in (_plain(kind.name), _short(kind)):
            return kind
    raise BadValue(f"gpu is {name!r}; it must be one of {', '.join(KINDS)}.")


def known(device: str) -> GPU | None:
    """The kind that a driver's device name ("NVIDIA H100 80GB HBM3") is of, or None.

    PCIe cards are slower than the kinds here, which are SXM.
    """
    there = _plain(device)
    if "pcie" in there:
        return None
    return next((kind for kind in _ALL if _short(kind) in there), None)


def _short(kind: GPU) -> str:
    """Its plain name without memory size and form, of which no other is here ("h100")."""
    return _plain(kind.name).removesuffix("80gb").removesuffix("sxm")


def _plain(name: str) -> str:
    return "".join(each for each in name.lower() if each.isalnum())
