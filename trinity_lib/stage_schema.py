"""Groups of a run that compares stages of one model: what moved, and what is inside.

A `stage` is a checkpoint, a `change` leads from one to another. `layer` counts as in the
model and has the layers with experts; `block` is how many layers a hidden state has passed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib.config import require
from trinity_lib.variable import Variable

_FOUND = ("finding",)
_TENSOR, _MOVE = ("tensor",), ("change", "tensor")
_LAYER, _EXPERT = ("stage", "layer"), ("stage", "layer", "expert")
_CHANGED, _MOVED = ("change", "layer"), ("change", "layer", "expert")
_BLOCK, _ASKED = ("stage", "block"), ("stage", "measure")
_RANK = "exponential of the entropy of the singular values of the change"

STAGES: dict[str, dict[str, Variable]] = {
    "findings": {
        "of_stage": Variable(_FOUND, "str", "1", "the checkpoint it is of, or oracle"),
        "asked_as": Variable(_FOUND, "str", "1", "text: as in the text; chat: as a question"),
        "family": Variable(_FOUND, "str", "1", "the audit"),
        "item": Variable(_FOUND, "str", "1", "what the figure is of"),
        "measure": Variable(_FOUND, "str", "1", "its name and unit"),
        "truth": Variable(_FOUND, "f8", "1", "by the generator of the text; NaN: none"),
        "estimate": Variable(_FOUND, "f8", "1", "of the model"),
        "low": Variable(_FOUND, "f8", "1", "lower end of the 95% interval"),
        "high": Variable(_FOUND, "f8", "1", "upper end of the 95% interval"),
        "chance": Variable(_FOUND, "f8", "1", "of a model that knows nothing; NaN: none"),
        "units": Variable(_FOUND, "i8", "1", "clusters the interval rests on"),
    },
    "weight_drift": {
        "module": Variable(_TENSOR, "str", "1", "which part of a layer, or of the model"),
        "tensor_layer": Variable(_TENSOR, "i8", "1", "its layer; -1: of none"),
        "tensor_expert": Variable(_TENSOR, "i8", "1", "its expert; -1: of none"),
        "full_rank": Variable(_TENSOR, "i8", "1", "smaller side of a matrix; 0: no matrix"),
        "norm": Variable(_MOVE, "f8", "1", "Frobenius norm before"),
        "norm_after": Variable(_MOVE, "f8", "1", "Frobenius norm after"),
        "moved": Variable(_MOVE, "f8", "1", "Frobenius norm of the change"),
        "relative": Variable(_MOVE, "f8", "1", "norm of the change over the norm before"),
        "cosine": Variable(_MOVE, "f8", "1", "cosine of before and after"),
        "effective_rank": Variable(_MOVE, "f8", "1", f"{_RANK}; NaN: no matrix"),
    },
    "expert_drift": {
        "relative": Variable(_MOVED, "f8", "1", "norm of the change over the norm before"),
        "cosine": Variable(_MOVED, "f8", "1", "cosine of before and after"),
        "effective_rank": Variable(_MOVED, "f8", "1", f"{_RANK}, mean of three matrices"),
        "load": Variable(
            _MOVED, "f8", "1", "mean load of both stages over the mean expert's; NaN: unknown"
        ),
    },
    "stage_routing": {
        "load": Variable(_EXPERT, "f8", "1", "load over the mean expert's"),
        "effective": Variable(_LAYER, "f8", "expert", "effective experts"),
        "token_information": Variable(
            _LAYER, "f8", "bit", "of expert and token id, above its permutation null"
        ),
        "label_information": Variable(
            _LAYER, "f8", "bit", "of expert and label, above its permutation null; NaN: none"
        ),
    },
    "routing_change": {
        "saturation": Variable(_CHANGED, "f8", "1", "later choices that were made already"),
        "chance": Variable(_CHANGED, "f8", "1", "the same of choices by chance: k / E"),
        "divergence": Variable(
            _CHANGED, "f8", "nat", "KL of a token's normalised scores, before from after"
        ),
        "load_divergence": Variable(
            _CHANGED, "f8", "nat", "KL of the loads, before from after"
        ),
    },
    "lens": {
        "divergence": Variable(_BLOCK, "f8", "nat", "KL of the final answer from the lens's"),
        "right": Variable(_BLOCK, "f8", "1", "share of targets that are the lens's first"),
        "rank": Variable(_BLOCK, "f8", "1", "median place of the target, 1 the first"),
        "depth": Variable(
            ("stage",),
            "f8",
            "1",
            "mean first block where the target is first, where it ends so",
        ),
    },
    "path": {
        "loss": Variable(("change", "alpha"), "f8", "nat", "along the line between two stages"),
        "barrier": Variable(
            ("change",), "f8", "nat", "highest loss above the line between both ends' losses"
        ),
    },
    "attribute_probe": {
        "accuracy": Variable(_BLOCK, "f8", "1", "of held-out clusters"),
        "low": Variable(_BLOCK, "f8", "1", "lower end of its 95% interval"),
        "high": Variable(_BLOCK, "f8", "1", "upper end of its 95% interval"),
        "chance": Variable(_BLOCK, "f8", "1", "mean accuracy where labels are permuted"),
        "p": Variable(_BLOCK, "f8", "1", "share of permutations that do as well"),
        "units": Variable(_BLOCK, "i8", "1", "clusters"),
    },
    "ablation": {
        "whole": Variable(_ASKED, "f8", "1", "the measure with all experts"),
        "effect": Variable(
            (*_ASKED, "layer", "expert"),
            "f8",
            "1",
            "the measure without the expert, less whole",
        ),
        "used": Variable(_EXPERT, "f8", "1", "share of tokens that choose the expert"),
    },
    "relearning": {
        "bias": Variable(("start", "look"), "f8", "1", "the measure after so many steps"),
        "steps": Variable(("start", "look"), "i8", "step", "of training; -1: not looked"),
        "needed": Variable(("start",), "f8", "step", "until the target; NaN: not reached"),
    },
}
"""Each is written whole; a part of `TABLES`."""


def dataset(
    group: str, values: Mapping[str, Any], coordinates: Mapping[str, Any]
) -> xr.Dataset:
    """A group of these with labels, dtypes and units; its variables must all be given."""
    variables = STAGES[group]
    wrong = sorted(set(values) ^ set(variables))
    require(not wrong, f"values of {group}", wrong, f"exactly {', '.join(variables)}")
    data = {
        name: (
            variable.dims,
            np.asarray(values[name]).astype(variable.dtype),
            {"units": variable.units, "long_name": variable.long_name},
        )
        for name, variable in variables.items()
    }
    used = {dim for variable in variables.values() for dim in variable.dims}
    return xr.Dataset(data, {dim: np.asarray(coordinates[dim]) for dim in sorted(used)})
