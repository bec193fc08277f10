"""Every group and variable of a run file: dimensions, dtype, units, meaning."""

from trinity_lib.stage_schema import STAGES
from trinity_lib.variable import Variable

SCHEMA_VERSION = "3"

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
    "posttrain": {
        "stage": Variable(_STEP, "i8", "1", "number of the stage, from 0"),
        "loss": Variable(_STEP, "f8", "nat", "what the stage minimises; of grpo no unit"),
        "accuracy": Variable(
            _STEP, "f8", "1", "share right: next tokens (sft), pairs (dpo), answers (grpo)"
        ),
        "margin": Variable(_STEP, "f8", "nat", "implicit reward, chosen less rejected (dpo)"),
        "reward": Variable(_STEP, "f8", "1", "mean reward of sampled answers (grpo)"),
        "kl": Variable(_STEP, "f8", "nat", "divergence from the reference, per token (grpo)"),
        "clipped": Variable(_STEP, "f8", "1", "share of tokens that the clip stops (grpo)"),
        "learning_rate": Variable(_STEP, "f8", "1", "as a share of pre-training's peak"),
        "grad_norm": Variable(_STEP, "f8", "1", "gradient norm before clipping"),
        "max_vio": Variable(_STEP, "f8", "1", "MaxVio, mean over layers"),
        "batch_tokens": Variable(_STEP, "i8", "token", "tokens routed in this step"),
        "seconds": Variable(_STEP, "f8", "s", "wall time of the step"),
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

/choices is written where a run was asked to record its choices; /posttrain takes /train's
place after pre-training, with NaN for what a stage has not.
"""

_TRIAL, _TRIAL_LAYER = ("trial",), ("trial", "trial_layer")
_TIME = (*_TRIAL, "time")
_MADE, _TOKEN = ("tokens", "routing"), ("probe_token",)
_TIMED = ("backend", *_MADE, "direction", "repetition")
_MARK, _ASKED = ("moment", "task"), ("question",)
_GPU, _STORED, _ARTICLE, _SUM = ("gpu",), ("gpu", "precision"), ("article",), ("reckoning",)
_HOSTED = ("card", "host", "precision")
_PART, _OPERATOR = ("moment", "part"), ("direction", "operator")
_COLLECTIVE = ("collective",)

TABLES: dict[str, dict[str, Variable]] = {
    "probe_tokens": {
        "token": Variable(_TOKEN, "i8", "1", "token of the probe"),
        "next": Variable(_TOKEN, "i8", "1", "the token after it; -1 at a document's end"),
        "domain_number": Variable(_TOKEN, "i8", "1", "number of its domain, from 0"),
    },
    "answers": {
        "accuracy": Variable(_MARK, "f8", "1", "share of right answers; NaN: not asked yet"),
        "formed": Variable(_MARK, "f8", "1", "share of answers of the form asked for"),
        "questions": Variable(("task",), "i8", "1", "held-out questions"),
    },
    "transcripts": {
        "subject": Variable(_ASKED, "str", "1", "task of the question"),
        "asked": Variable(_ASKED, "str", "1", "the question"),
        "wanted": Variable(_ASKED, "str", "1", "the right answer"),
        "said": Variable(("moment", *_ASKED), "str", "1", "the greedy answer"),
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
    "gpus": {
        "memory": Variable(_GPU, "f8", "byte", "memory"),
        "bf16": Variable(_GPU, "f8", "FLOP/s", "dense bf16 matrix products"),
        "fp8": Variable(_GPU, "f8", "FLOP/s", "dense fp8 matrix products; NaN: has none"),
        "fp4": Variable(_GPU, "f8", "FLOP/s", "dense fp4 matrix products; NaN: has none"),
        "bandwidth": Variable(_GPU, "f8", "byte/s", "of its memory"),
        "link": Variable(_GPU, "f8", "byte/s", "to its neighbours, both ways together"),
        "host": Variable(_GPU, "f8", "byte/s", "from the host's memory, one way"),
        "price": Variable(_GPU, "f8", "dollar/h", "assumed where none is given"),
        "source": Variable(_GPU, "str", "1", "where the vendor publishes this"),
        "price_source": Variable(_GPU, "str", "1", "whose price"),
    },
    "memory": {
        "bytes": Variable(
            ("moment", "part"), "f8", "byte", "on the rank with most, at moments of a step"
        ),
    },
    "flops": {
        "forward": Variable(("operation",), "f8", "FLOP", "forward operations of a token"),
    },
    "cost": {
        "days": Variable(("efficiency",), "f8", "day", "of training"),
        "dollars": Variable(("efficiency", "price"), "f8", "dollar", "of training"),
    },
    "reckonings": {
        "parameters": Variable(_SUM, "f8", "1", "N of 6ND; NaN: counted from the shapes"),
        "operations": Variable(_SUM, "f8", "FLOP", "of the whole run"),
        "rate": Variable(_SUM, "f8", "FLOP/s", "of each GPU, if the run took `days`"),
        "efficiency": Variable(_SUM, "f8", "1", "the same as a share of dense bf16"),
    },
    "fits": {
        "training_gpus": Variable(_GPU, "i8", "1", "fewest GPUs that train; 0: no number"),
        "training_bytes": Variable(_GPU, "f8", "byte", "peak there on the rank with most"),
        "training_experts": Variable(_GPU, "i8", "1", "ranks that share a layer's experts"),
        "bits": Variable(("precision",), "f8", "bit", "a weight, scales included"),
        "inference_gpus": Variable(_STORED, "i8", "1", "fewest GPUs of weights and cache"),
        "decoding": Variable(
            _STORED, "f8", "token/s", "one sequence at most, on so many GPUs: memory traffic"
        ),
    },
    "offload": {
        "resident": Variable((), "f8", "byte", "must stay on the GPU: no routed experts"),
        "experts": Variable(("precision",), "f8", "byte", "all routed experts"),
        "cached": Variable(
            ("card", "precision"), "f8", "1", "share of them that has room on the GPU"
        ),
        "bandwidth": Variable(
            ("card", "host"), "f8", "byte/s", "at which experts in the host's memory are read"
        ),
        "host_bound": Variable(_HOSTED, "f8", "token/s", "if nothing but the host took time"),
        "decoding": Variable(_HOSTED, "f8", "token/s", "one sequence at most"),
    },
    "traffic": {
        "read": Variable(("sequences",), "f8", "1", "parameters that a decoding step reads"),
    },
    "published": {
        "published": Variable(("quantity",), "f8", "1", "what is published"),
        "computed": Variable(("quantity",), "f8", "1", "what the shapes give"),
        "unit": Variable(("quantity",), "str", "1", "of both"),
    },
    "articles": {
        "said": Variable(_ARTICLE, "f8", "1", "the number that is said"),
        "figure": Variable(_ARTICLE, "f8", "1", "the number that the shapes give"),
        "unit": Variable(_ARTICLE, "str", "1", "of both"),
        "verdict": Variable(_ARTICLE, "str", "1", "in a word or two"),
        "finding": Variable(_ARTICLE, "str", "1", "what is right"),
    },
    "parameters": {
        "whole": Variable(("kind",), "i8", "1", "parameters of the model"),
        "rank_0": Variable(("kind",), "i8", "1", "held by rank 0, read off the sharded model"),
        "least": Variable(("kind",), "i8", "1", "on the rank that holds least of all kinds"),
        "most": Variable(("kind",), "i8", "1", "on the rank that holds most"),
    },
    "rehearsed_memory": {
        "planned": Variable(_PART, "f8", "byte", "on the rank with most; NaN: not planned"),
        "traced": Variable(_PART, "f8", "byte", "on rank 0, where the moment is fullest"),
    },
    "operations": {
        "planned": Variable(_OPERATOR, "f8", "FLOP", "a micro-batch; NaN: not planned"),
        "traced": Variable(
            _OPERATOR, "f8", "FLOP", "of a micro-batch, or of the optimisers, on rank 0"
        ),
    },
    "collectives": {
        "ranks": Variable(_COLLECTIVE, "i8", "1", "that take part"),
        "calls": Variable(_COLLECTIVE, "i8", "1", "of rank 0 in an optimiser step"),
        "bytes": Variable(
            _COLLECTIVE, "f8", "byte", "buffers of all calls: gathered, to be summed, or sent"
        ),
        "sent": Variable(_COLLECTIVE, "f8", "byte", "what leaves rank 0, by ring algorithms"),
    },
    **STAGES,
}
"""Groups without a step: each is written whole.

/probe_tokens is a training run's; /answers and /transcripts are post-training's, before its
first stage and after each; /trials, /results and /claims are a study's, whose layers
count from the first MoE layer; /agreement and /speed are those of a run that measures kernels;
/gpus to /articles are a plan's; /parameters to /collectives a rehearsal's; those of
`stage_schema` compare stages of one model.
"""
