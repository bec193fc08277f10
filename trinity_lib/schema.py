"""Every group and variable of a run file: dimensions, dtype, units, meaning."""

from typing import NamedTuple

SCHEMA_VERSION = "3"


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
_PROBE = ("step", "layer", "probe_token", "choice")

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
    "probe": {
        "router_entropy": Variable(
            _LAYER, "f8", "1", "mean entropy of a token's scores, share of ln(experts)"
        ),
        "mutual_information": Variable(
            _LAYER, "f8", "bit", "information of a token's scores about its expert"
        ),
        "override": Variable(
            _LAYER, "f8", "1", "share of choices that are not the bias-free top-k's"
        ),
        "score_price": Variable(
            _LAYER, "f8", "1", "scores of the chosen over those of the bias-free top-k"
        ),
        "churn": Variable(
            _LAYER, "f8", "1", "share of choices that changed since the last evaluation"
        ),
        "churn_by_weights": Variable(_LAYER, "f8", "1", "churn owed to the weights"),
        "churn_by_bias": Variable(_LAYER, "f8", "1", "churn owed to the bias"),
        "expert": Variable(_PROBE, "i4", "1", "expert chosen by a probe token, best first"),
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

_TRIAL, _TRIAL_LAYER = ("trial",), ("trial", "trial_layer")
_TIME = (*_TRIAL, "time")
_MADE, _TOKEN = ("tokens", "routing"), ("probe_token",)
_TIMED = ("backend", *_MADE, "direction", "repetition")

TABLES: dict[str, dict[str, Variable]] = {
    "probe_tokens": {
        "token": Variable(_TOKEN, "i8", "1", "token of the probe"),
        "next": Variable(_TOKEN, "i8", "1", "the token after it; -1 at a document's end"),
        "domain_number": Variable(_TOKEN, "i8", "1", "number of its domain, from 0"),
    },
    "trials": {
        "key": Variable(_TRIAL, "str", "1", "the run, the same for the same run"),
        "part": Variable(_TRIAL, "str", "1", "what the run is for"),
        "axis": Variable(_TRIAL, "str", "1", "what is varied"),
        "level": Variable(_TRIAL, "str", "1", "to what"),
        "method": Variable(_TRIAL, "str", "1", "balancer"),
        "rate": Variable(_TRIAL, "f8", "1", "step size or weight of the balancer"),
        "seed": Variable(_TRIAL, "i8", "1", "seed of weights and data order"),
        "status": Variable(_TRIAL, "str", "1", "complete, failed or missing"),
        "reason": Variable(_TRIAL, "str", "1", "why it failed"),
    },
    "results": {
        "loss": Variable(
            (*_TRIAL, "trial_domain"), "f8", "nat", "validation loss per token at the end"
        ),
        "loss_chosen": Variable(
            _TRIAL, "f8", "nat", "validation loss with the balancer's own choices"
        ),
        "loss_causal": Variable(
            _TRIAL, "f8", "nat", "on the same rows, with top-k of score and stored bias"
        ),
        "leak": Variable(
            _TRIAL_LAYER, "f8", "1", "share of tokens whose experts depend on later tokens"
        ),
        "seconds": Variable(_TRIAL, "f8", "s", "median wall time of a step"),
        "floor": Variable(_TRIAL, "f8", "1", "MaxVio of uniform routing of a batch"),
        "atom_floor": Variable(
            _TRIAL, "f8", "1", "MaxVio where equal tokens take equal experts"
        ),
        "max_vio": Variable(_TRIAL_LAYER, "f8", "1", "MaxVio of a batch, last fifth of steps"),
        "excess": Variable(_TRIAL_LAYER, "f8", "1", "MaxVio of a batch less its floor"),
        "min_vio": Variable(_TRIAL_LAYER, "f8", "1", "MinVio of a batch, last fifth of steps"),
        "max_vio_global": Variable(_TRIAL_LAYER, "f8", "1", "MaxVio of the validation text"),
        "excess_global": Variable(
            _TRIAL_LAYER, "f8", "1", "MaxVio of the validation text less its floor"
        ),
        "dead": Variable(_TRIAL_LAYER, "f8", "1", "share of experts dead on validation"),
        "starved": Variable(_TRIAL_LAYER, "f8", "1", "share under a tenth of the mean load"),
        "ever_dead": Variable(_TRIAL_LAYER, "f8", "1", "share of experts dead at some time"),
        "rescue_time": Variable(
            _TRIAL_LAYER, "f8", "step", "mean time until a dead expert is back; NaN: none was"
        ),
        "effective": Variable(_TRIAL_LAYER, "f8", "expert", "effective experts on validation"),
        "gini": Variable(_TRIAL_LAYER, "f8", "1", "Gini coefficient of validation loads"),
        "cv": Variable(_TRIAL_LAYER, "f8", "1", "CV of validation loads"),
        "bias_range": Variable(_TRIAL_LAYER, "f8", "1", "highest less lowest selection bias"),
        "oscillation": Variable(
            _TRIAL_LAYER, "f8", "1", "spread of the detrended bias, last quarter of records"
        ),
        "override": Variable(_TRIAL_LAYER, "f8", "1", "share of choices owed to the bias"),
        "score_price": Variable(_TRIAL_LAYER, "f8", "1", "scores chosen over best scores"),
        "router_entropy": Variable(_TRIAL_LAYER, "f8", "1", "of a token's scores, normalised"),
        "mutual_information": Variable(_TRIAL_LAYER, "f8", "bit", "of scores and expert"),
        "churn": Variable(_TRIAL_LAYER, "f8", "1", "choices changed over the last quarter"),
        "churn_by_weights": Variable(_TRIAL_LAYER, "f8", "1", "churn owed to the weights"),
        "churn_by_bias": Variable(_TRIAL_LAYER, "f8", "1", "churn owed to the bias"),
        "saturation": Variable(
            _TRIAL_LAYER, "f8", "1", "final choices already made half-way through"
        ),
        "token_information": Variable(
            _TRIAL_LAYER, "f8", "bit", "of expert and token id, above its permutation null"
        ),
        "domain_information": Variable(
            _TRIAL_LAYER, "f8", "bit", "of expert and domain, above its permutation null"
        ),
        "vocabulary": Variable(
            _TRIAL_LAYER, "f8", "1", "largest share of a token id, above its permutation null"
        ),
        "co_activation": Variable(
            _TRIAL_LAYER, "f8", "1", "share of an expert's tokens with its closest partner"
        ),
        "loss_curve": Variable(_TIME, "f8", "nat", "training loss"),
        "max_vio_curve": Variable(
            (*_TIME, "trial_layer"), "f4", "1", "MaxVio of a batch over time"
        ),
        "dead_curve": Variable(
            (*_TIME, "trial_layer"), "f4", "1", "share of dead experts, trailing window"
        ),
        "load": Variable(
            (*_TRIAL_LAYER, "expert_rank"), "f4", "1", "validation load over the mean, sorted"
        ),
    },
    "claims": {
        "statement": Variable(("claim",), "str", "1", "what is said"),
        "statistic": Variable(("claim",), "str", "1", "what was measured"),
        "estimate": Variable(("claim",), "f8", "1", "its mean over seeds"),
        "low": Variable(("claim",), "f8", "1", "lower end of its 95% interval"),
        "high": Variable(("claim",), "f8", "1", "upper end of its 95% interval"),
        "seeds": Variable(("claim",), "i8", "1", "seeds it rests on"),
        "verdict": Variable(("claim",), "str", "1", "supported, not supported or undecided"),
    },
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
"""Groups without a step: each is written whole.

/probe_tokens is a training run's; /trials, /results and /claims are a study's, whose layers
count from the first MoE layer; /agreement and /speed are those of a run that measures kernels.
"""
