"""The trials of a collapse study: which runs, and what each of them is for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from trinity_lib.attention import AttentionConfig
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import digest, override
from trinity_lib.data import DataConfig
from trinity_lib.model import ModelConfig
from trinity_lib.optim import OptimConfig, Phase
from trinity_lib.routing import RouterConfig
from trinity_lib.run import RunConfig
from trinity_lib.study_config import STEPPED, UNTUNED, StudyConfig, shown

CURVES = ("smebu", "sign", "loss_free", "switch")
"""Whose whole grid is run with several seeds."""
REFERENCE_RATE = 1e-2
"""Step size of SMEBU where another of its settings is varied; fixed before any run."""
_Axes = dict[str, dict[str, dict[str, Any]]]
UNGUARDED = 1000.0
"""`spike` where batches hold little else than one domain: their losses jump, all is well."""
RESCUERS = ("none", "smebu", "sign", "quantile", "switch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run, in one of its roles: a run that serves several is trained once."""

    part: str
    """What it belongs to."""
    axis: str
    """What is varied."""
    level: str
    """To what."""
    config: RunConfig
    """The run; its first weights are the parent's, where it has one."""
    parent: str = ""
    """Key of the run whose last checkpoint it begins with."""

    @property
    def key(self) -> str:
        """The same for the same run."""
        return digest(self.config) + (f"-{self.parent}" if self.parent else "")


def base(config: StudyConfig) -> RunConfig:
    """The run that every trial is an edit of.

    A router of 256 experts, top-4, after one dense layer, over BPE tokens, most of them of a
    register that has to be stored, so that idle experts cost something; AdamW, the quicker
    optimiser here; no sequence-wise loss beside the balancer.
    """
    toy, small = config.scale == "toy", config.scale == "small"
    width, length = 32 if toy else 64, 64 if toy or small else 128
    rows = 8 if toy or small else 16
    facts = {"facts": 0.6, "arithmetic": 0.4}
    texts = {"code": 0.15, "prose": 0.15, "registry": 0.7}
    return RunConfig(
        scale=f"study-{config.scale}",
        model=ModelConfig(
            vocab_size=1024,
            width=width,
            num_layers=3,
            num_dense_layers=1,
            dense_width=width,
            expert_width=8,
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16, window=32),
            router=RouterConfig(
                num_experts=32 if toy else 64 if small else 256,
                top_k=2 if toy else 4,
                route_scale=2.448,
            ),
        ),
        data=DataConfig(
            corpus="procedural" if toy else "registered",
            sequence_length=length,
            rsdb=32,
            validation_rows=4 if toy else 16 if small else 32,
        ),
        balance=BalanceConfig(method="none", rate=0.0, sequence_loss=0.0),
        optim=OptimConfig(optimizer="adamw", muon_rate=2e-2, adamw_rate=5e-3),
        phases=(
            Phase(
                tokens=config.steps * rows * length,
                batch=rows,
                warmup=min(10, config.steps),
                shape="cosine",
                end=0.1,
                mixture=facts if toy else texts,
            ),
        ),
        micro_batches=1 if toy else 2,
        evaluate_every=-(-config.steps // (2 if toy else 4)),
        checkpoint_every=1_000_000,
        log_every=1_000_000,
        probe_tokens=512 if toy else 2048 if small else 4096,
        record_every=max(1, config.steps // 80),
    )


def first_wave(config: StudyConfig) -> list[Trial]:
    """What needs no result: the grid, causes, and SMEBU taken apart."""
    trials: list[Trial] = []
    if "balancers" in config.parts:
        trials += _grid(config)
    if "causes" in config.parts:
        trials += _causes(config)
    if "anatomy" in config.parts:
        trials += _anatomy(config)
    if "rescue" in config.parts:
        trials += [_parent(config, seed) for seed in axis_seeds(config)]
    return trials


def second_wave(config: StudyConfig, best: Mapping[str, float]) -> list[Trial]:
    """What is run at each balancer's `best` step size: finals over fresh seeds, batches,
    rescues. One without any, because it diverged at all, is left out; where no grid was run
    it is `REFERENCE_RATE`."""
    tried = config.methods if "balancers" in config.parts else ()
    untried = {m: REFERENCE_RATE for m in STEPPED if m not in tried}
    best = {**untried, **best, **dict.fromkeys(UNTUNED, 0.0)}
    trials: list[Trial] = []
    if "balancers" in config.parts and config.seeds > 1:
        for method in config.methods:
            for seed in range(1, config.seeds + 1) if method in best else ():
                trials.append(_trial(config, "finals", method, method, best[method], seed))
    if "anatomy" in config.parts:
        trials += _batches(config, best)
    if "rescue" in config.parts:
        trials += _rescues(config, best)
    return trials


def most(config: StudyConfig) -> list[Trial]:
    """As many trials as there can be, before it is known which runs two roles share."""
    nobodys = dict.fromkeys(STEPPED, 0.5)  # a step size of no grid
    return first_wave(config) + second_wave(config, nobodys)


def axis_seeds(config: StudyConfig) -> range:
    """Seeds of what is varied beside the grid; those of the finals where there are any."""
    first = 1 if config.seeds > 1 else 0
    return range(first, first + config.axis_seeds)


def _trial(
    config: StudyConfig, part: str, level: str, method: str, rate: float, seed: int,
    axis: str = "balancer", **changes: Any,
) -> Trial:  # fmt: skip
    edits: dict[str, Any] = {"balance.method": method, "balance.rate": rate, "seed": seed}
    edits |= {name.replace("__", "."): value for name, value in changes.items()}
    return Trial(part=part, axis=axis, level=level, config=override(base(config), edits))


def _grid(config: StudyConfig) -> list[Trial]:
    trials = []
    for method in config.methods:
        seeds = config.curve_seeds if method in CURVES else 1
        for rate in config.rates if method in STEPPED else (0.0,):
            for seed in range(seeds if method in STEPPED else 1):
                trials.append(_trial(config, "grid", f"{rate:g}", method, rate, seed))
    return trials


def _causes(config: StudyConfig) -> list[Trial]:
    """Without a balancer, one thing moved at a time."""
    model, optim, phase = base(config).model, base(config).optim, base(config).phases[0]
    few = max(2 * model.router.top_k, model.router.num_experts // 16)
    axes: _Axes = {
        "experts": {
            str(n): {"model__router__num_experts": n}
            for n in (few, model.router.num_experts // 4, model.router.num_experts)
        },
        "learning rate": {
            f"{f:g} x": {"optim__adamw_rate": f * optim.adamw_rate} for f in (0.3, 1, 3)
        },
        "rows a batch": _rows(phase),
        "order": {"packed in order": {"data__rsdb": 0, "spike": UNGUARDED}, "RSDB": {}},
        "optimiser": {
            "AdamW": {},
            "Muon, idle experts rest": {"optim__optimizer": "muon"},
            "Muon, idle experts move": {
                "optim__optimizer": "muon", "optim__idle_experts": "move",
            },
        },
        "leading dense layers": {
            str(n): {"model__num_dense_layers": n, "model__num_layers": n + 2}
            for n in (0, 1, 2)
        },
    }  # fmt: skip
    return _varied(config, "causes", axes, {"none": 0.0})


def _anatomy(config: StudyConfig) -> list[Trial]:
    """SMEBU with one part changed at a time.

    Near balance SMEBU steps by lambda kappa v, so kappa alone also changes the gain: it is
    varied beside that with lambda kappa held.
    """
    alone: _Axes = {
        "kappa": {f"{k:g}": {"balance__kappa": k} for k in (0.5, 2.0, 8.0)},
        "kappa at equal gain": {
            f"{k:g}": {"balance__kappa": k, "balance__rate": 2 * REFERENCE_RATE / k}
            for k in (0.5, 2.0, 8.0)
        },
        "beta": {f"{b:g}": {"balance__beta": b} for b in (0.0, 0.5, 0.9)},
        "centring": {"on": {}, "off": {"balance__centre": False}},
    }
    return _varied(config, "anatomy", alone, {"smebu": REFERENCE_RATE})


def _batches(config: StudyConfig, best: Mapping[str, float]) -> list[Trial]:
    """SMEBU beside sign over the batch's size, each at its best step size."""
    phase = base(config).phases[0]
    batches: _Axes = {"rows a batch": _rows(phase)}
    rates = {m: best[m] for m in ("smebu", "sign") if m in best}
    return _varied(config, "anatomy", batches, rates)


def _varied(
    config: StudyConfig,
    part: str,
    axes: _Axes,
    rates: Mapping[str, float],
) -> list[Trial]:
    return [
        _trial(config, part, level, method, rate, seed, axis=axis, **changes)
        for seed in axis_seeds(config)
        for axis, levels in axes.items()
        for level, changes in levels.items()
        for method, rate in rates.items()
    ]


def _parent(config: StudyConfig, seed: int) -> Trial:
    return _trial(config, "rescue", "before", "none", 0.0, seed, axis="rescue")


def _rescues(config: StudyConfig, best: Mapping[str, float]) -> list[Trial]:
    """A collapsed run gone on with under another balancer, at half its peak learning rate.

    As many steps again over the same text, the optimiser begun anew.
    """
    trials = []
    for seed in axis_seeds(config):
        parent = _parent(config, seed).key
        for method in RESCUERS:
            if method not in best:
                continue
            trial = _trial(
                config, "rescue", method, method, best[method], seed, axis="rescue",
                optim__adamw_rate=base(config).optim.adamw_rate / 2,
            )  # fmt: skip
            trials.append(dataclasses.replace(trial, parent=parent))
    return trials


def _rows(phase: Phase) -> dict[str, dict[str, Any]]:
    """As many steps, of a quarter of the batch, the batch, and four times it."""
    levels: dict[str, dict[str, Any]] = {}
    for rows in (phase.batch // 4, phase.batch, 4 * phase.batch):
        tokens = phase.tokens // phase.batch * rows
        other = dataclasses.replace(phase, tokens=tokens, batch=rows)
        levels[str(rows)] = {"phases": (other,)}
        if rows < phase.batch:
            levels[str(rows)]["spike"] = UNGUARDED
    return levels


def describe(config: StudyConfig) -> str:
    """One line on what is about to run."""
    if config.source:
        return f"drawn from {shown(config.source)}"
    model, phase = base(config).model, base(config).phases[0]
    runs = len({trial.key for trial in most(config)})
    return (
        f"{config.name}: at most {runs} runs of {config.steps} steps of {phase.batch} x "
        f"{base(config).data.sequence_length} tokens, {model.router.num_experts} experts, "
        f"top-{model.router.top_k}, {config.workers} at a time"
    )
