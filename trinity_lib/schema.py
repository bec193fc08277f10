"""Every group and variable of a run file: dimensions, dtype, units, meaning."""

from typing import NamedTuple

SCHEMA_VERSION = "2"


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


_STEP, _LAYER = ("step",), ("step", "layer")
_EXPERT, _DOMAIN = ("step", "layer", "expert"), ("step", "split", "domain")
_CHOICE = ("step", "layer", "token", "choice")

SCHEMA: dict[str, dict[str, Variable]] = {
    "train": {
        "loss": Variable(_STEP, "f8", "nat", "training cross entropy per token"),
        "z_loss": Variable(_STEP, "f8", "nat^2", "mean squared log-partition of the logits"),
        "balance_loss": Variable(_STEP, "f8", "1", "weighted balancing loss"),
        "learning_rate": Variable(_STEP, "f8", "1", "learning rate as a share of its peak"),
        "grad_norm": Variable(_STEP, "f8", "1", "gradient norm before clipping"),
        "tokens": Variable(_STEP, "i8", "token", "tokens trained so far"),
        "batch_tokens": Variable(_STEP, "i8", "token", "tokens routed in this step"),
        "batch_het": Variable(
            _STEP, "f8", "nat", "BatchHet: highest less mean micro-batch loss"
        ),
        "seconds": Variable(_STEP, "f8", "s", "wall time of the step"),
        "phase": Variable(_STEP, "i8", "1", "phase of the schedule"),
    },
    "layers": {
        "max_vio": Variable(_LAYER, "f8", "1", "MaxVio: highest load over mean load, less 1"),
        "min_vio": Variable(_LAYER, "f8", "1", "MinVio: 1 less lowest load over mean load"),
        "load_entropy": Variable(_LAYER, "f8", "nat", "entropy of the expert loads"),
        "effective_experts": Variable(
            _LAYER, "f8", "expert", "exponential of the load entropy"
        ),
        "bias_std": Variable(_LAYER, "f8", "1", "standard deviation of the selection bias"),
        "bias_range": Variable(_LAYER, "f8", "1", "highest less lowest selection bias"),
    },
    "routing": {
        "count": Variable(_EXPERT, "i8", "token", "tokens routed to the expert in this step"),
        "bias": Variable(_EXPERT, "f4", "1", "selection bias after the step"),
    },
    "choices": {
        "expert": Variable(
            _CHOICE, "i2", "1", "expert chosen, by position in the step's batch; -1 for none"
        ),
    },
    "evaluation": {
        "loss": Variable(_DOMAIN, "f8", "nat", "cross entropy per token"),
        "bits_per_byte": Variable(_DOMAIN, "f8", "bit", "cross entropy per byte of text"),
        "gzip_bits_per_byte": Variable(_DOMAIN, "f8", "bit", "gzip -9 on the same bytes"),
        "unigram_entropy": Variable(_DOMAIN, "f8", "nat", "unigram entropy of the same tokens"),
        "tokens": Variable(_DOMAIN, "i8", "token", "tokens predicted"),
        "bytes": Variable(_DOMAIN, "i8", "byte", "bytes of text predicted"),
        "count": Variable(
            (*_DOMAIN, "layer", "expert"),
            "i8",
            "token",
            "evaluated tokens routed to the expert",
        ),
    },
}
"""Groups and variables along steps; each group has its own `step`.

/choices is written where a run was asked to record its choices.
"""

_MADE = ("tokens", "routing")
_TIMED = ("backend", *_MADE, "direction", "repetition")

TABLES: dict[str, dict[str, Variable]] = {
    "agreement": {
        "error": Variable(
            ("backend", *_MADE, "quantity"),
            "f8",
            "1",
            "norm of the difference from float64 over float64's norm; NaN: not measured",
        ),
        "max_vio": Variable(
            _MADE, "f8", "1", "MaxVio of the routing: highest load over mean load, less 1"
        ),
    },
    "speed": {
        "seconds": Variable(_TIMED, "f8", "s", "wall time of one pass; NaN: not timed"),
        "flops": Variable(
            ("tokens", "direction"), "f8", "FLOP", "operations of the chosen experts, one pass"
        ),
        "dense_rate": Variable(
            (*_MADE, "repetition"), "f8", "FLOP/s", "rate of one dense matrix product beside it"
        ),
    },
}
"""Groups without a step, of runs that measure kernels: each is written whole."""
