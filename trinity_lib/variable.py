"""How a variable of a run file is stored."""

from typing import NamedTuple


class Variable(NamedTuple):
    """How one variable is stored."""

    dims: tuple[str, ...]
    """Dimensions, `step` first where the group has one."""
    dtype: str
    """numpy dtype."""
    units: str
    """Units, "1" for a pure number."""
    long_name: str
    """What it is."""
