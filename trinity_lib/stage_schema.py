"""Groups of a run that compares stages of one model: what moved, and what is inside.

A `stage` is a checkpoint, a `change` leads from one to another. `layer` counts as in the
model and has the layers with experts; `block` is how many layers a hidden state has passed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib.config import require
from trinity_lib.variable import Variable

_FOUND, _FAMILY, _CHAINS = ("finding",), ("family",), ("claim", "chain")
_TENSOR, _MOVE = ("tensor",), ("change", "tensor")
_LAYER, _EXPERT = ("stage", "layer"), ("stage", "layer", "expert")
_CHANGED, _MOVED = ("change", "layer"), ("change", "layer", "expert")
_READ = ("lens_place", "probed", "block")
_PROBED = ("place", "probed", "block")
_STAGE, _BLOCK, _ASKED = ("stage",), ("stage", "block"), ("ablated", "measure")
_ABLATED = (*_ASKED, "layer", "expert")
_OVER = "norm of the change over the norm before"
_ACROSS = ("change", "domain")
_RANK = "exponential of the entropy of the singular values of the change"

STAGES: dict[str, dict[str, Variable]] = {
    "findings": {
        "model_seed": Variable(_FOUND, "i8", "1", "the chain's seed; -1: a given checkpoint"),
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
    "claim_values": {
        "estimate": Variable(_CHAINS, "f8", "1", "a statement's statistic, of one chain"),
        "low": Variable(_CHAINS, "f8", "1", "lower end of its own 95% interval; NaN: none"),
        "high": Variable(_CHAINS, "f8", "1", "upper end; NaN: none"),
    },
    "audits": {
        "share": Variable(_FAMILY, "f8", "1", "of null worlds in which an effect is found"),
        "low": Variable(_FAMILY, "f8", "1", "lower end of the binomial interval of 5%"),
        "high": Variable(_FAMILY, "f8", "1", "upper end"),
        "calibrated": Variable(_FAMILY, "i1", "1", "whether the share is between them"),
        "covered": Variable(
            _FAMILY, "f8", "1", "of planted worlds whose truth the interval covers"
        ),
        "draws": Variable(_FAMILY, "i8", "1", "worlds of either kind"),
    },
    "weight_drift": {
        "module": Variable(_TENSOR, "str", "1", "which part of a layer, or of the model"),
        "tensor_layer": Variable(_TENSOR, "i8", "1", "its layer; -1: of none"),
        "tensor_expert": Variable(_TENSOR, "i8", "1", "its expert; -1: of none"),
        "full_rank": Variable(_TENSOR, "i8", "1", "smaller side of a matrix; 0: no matrix"),
        "norm": Variable(_MOVE, "f8", "1", "Frobenius norm before"),
        "norm_after": Variable(_MOVE, "f8", "1", "Frobenius norm after"),
        "moved": Variable(_MOVE, "f8", "1", "Frobenius norm of the change"),
        "relative": Variable(_MOVE, "f8", "1", f"{_OVER}; NaN: that is 0"),
        "cosine": Variable(_MOVE, "f8", "1", "cosine of before and after; NaN: one is 0"),
        "effective_rank": Variable(_MOVE, "f8", "1", f"{_RANK}; NaN: no matrix, or no change"),
    },
    "expert_drift": {
        "relative": Variable(_MOVED, "f8", "1", f"{_OVER}, three matrices as one vector"),
        "cosine": Variable(_MOVED, "f8", "1", "cosine of before and after, likewise"),
        "effective_rank": Variable(
            _MOVED, "f8", "1", f"{_RANK}, mean of the matrices that changed; NaN: none"
        ),
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
            _LAYER,
            "f8",
            "bit",
            "of expert and label, above its null of labels permuted over rows; NaN: none",
        ),
    },
    "routing_change": {
        "saturation": Variable(_CHANGED, "f8", "1", "later choices that were made already"),
        "chance": Variable(_CHANGED, "f8", "1", "the same of choices by chance: k / E"),
        "divergence": Variable(
            _CHANGED, "f8", "nat", "KL(before || after) of normalised scores, mean of tokens"
        ),
        "load_divergence": Variable(
            _CHANGED, "f8", "nat", "KL(before || after) of loads, 1/2 added to each count"
        ),
    },
    "lens": {
        "divergence": Variable(_BLOCK, "f8", "nat", "KL of the final answer from the lens's"),
        "right": Variable(_BLOCK, "f8", "1", "share of targets that are the lens's first"),
        "rank": Variable(_BLOCK, "f8", "1", "median place of the target, 1 the first"),
        "depth": Variable(
            _STAGE, "f8", "1", "mean block from which on the target is first, where it ends so"
        ),
        "low": Variable(_STAGE, "f8", "1", "lower end of the depth's 95% interval"),
        "high": Variable(_STAGE, "f8", "1", "upper end of the depth's 95% interval"),
        "units": Variable(_STAGE, "i8", "1", "clusters the depth rests on"),
        "shared_depth": Variable(
            _STAGE, "f8", "1", "depth over targets that end as the first in all stages"
        ),
        "shared_units": Variable(_STAGE, "i8", "1", "clusters the shared depth rests on"),
    },
    "path": {
        "loss": Variable(("change", "alpha"), "f8", "nat", "along the line between two stages"),
        "barrier": Variable(
            ("change",), "f8", "nat", "highest loss above the line between both ends' losses"
        ),
    },
    "task_vector": {
        "loss": Variable(
            ("task", "scale", "domain"), "f8", "nat", "with a change's weights added, scaled"
        ),
    },
    "functional": {
        "divergence": Variable(
            _ACROSS, "f8", "nat", "KL(before || after) of the next token, mean of rows' means"
        ),
        "low": Variable(_ACROSS, "f8", "nat", "lower end of its 95% interval over rows"),
        "high": Variable(_ACROSS, "f8", "nat", "upper end of its 95% interval over rows"),
        "same_first": Variable(
            _ACROSS, "f8", "1", "share of tokens whose likeliest next token is the same"
        ),
        "rows": Variable(_ACROSS, "i8", "1", "rows the interval rests on"),
    },
    "attribute_probe": {
        "accuracy": Variable(_PROBED, "f8", "1", "of names the probe was not trained on"),
        "low": Variable(_PROBED, "f8", "1", "lower end of its 95% interval"),
        "high": Variable(_PROBED, "f8", "1", "upper end of its 95% interval"),
        "chance": Variable(_PROBED, "f8", "1", "mean accuracy where labels are permuted"),
        "p": Variable(_PROBED, "f8", "1", "share of permutations that do as well"),
        "p_adjusted": Variable(
            _PROBED, "f8", "1", "share of permutations that do as well in any block"
        ),
        "seen": Variable(
            _PROBED,
            "f8",
            "1",
            "accuracy for names trained on, in other prompts; NaN: one prompt",
        ),
        "control": Variable(_PROBED, "f8", "1", "the same of permuted labels"),
        "selectivity": Variable(_PROBED, "f8", "1", "seen less control"),
        "units": Variable(_PROBED, "i8", "1", "names"),
    },
    "association_lens": {
        "slope": Variable(
            _READ, "f8", "1", "log-odds of jobs by the logit lens, per planted log-odds"
        ),
        "low": Variable(_READ, "f8", "1", "lower end of its 95% interval over names"),
        "high": Variable(_READ, "f8", "1", "upper end"),
        "units": Variable(_READ, "i8", "1", "names"),
    },
    "ablation": {
        "whole": Variable(_ASKED, "f8", "1", "the measure with all experts"),
        "effect": Variable(_ABLATED, "f8", "1", "the measure without the expert, less whole"),
        "used": Variable(
            _ABLATED, "f8", "1", "share of the measure's tokens that choose the expert"
        ),
        "rank": Variable(
            _ABLATED, "f8", "1", "of the effect's size among experts used, 1 the largest; NaN"
        ),
        "z": Variable(
            _ABLATED, "f8", "1", "effect less the other used experts' mean, over their spread"
        ),
    },
    "relearning": {
        "bias": Variable(("start", "lesson", "look"), "f8", "1", "the measure at each look"),
        "steps": Variable(("look",), "i8", "step", "of training before the look"),
        "target": Variable(("lesson",), "f8", "1", "what the lesson should bring it to"),
        "needed": Variable(
            ("start", "lesson"), "f8", "step", "until the target; NaN: not reached"
        ),
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


def change_names(changes: Sequence[tuple[str, str]], stages: Sequence[str]) -> list[str]:
    """Labels of dimension `change`, "BEFORE -> AFTER"; BadValue for a stage there is not."""
    require(len(changes) > 0, "changes", list(changes), "one pair of stages or more")
    once = len(set(changes)) == len(changes)
    require(once, "changes", list(changes), "pairs that are each named once")
    for change in changes:
        for stage in change:
            require(stage in stages, "changes", change, f"of stages {', '.join(stages)}")
    return [f"{before} -> {after}" for before, after in changes]
