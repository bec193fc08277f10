"""What decides post-training: where it begins, its stages, and what each is given."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trinity_lib import checkpoint
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import BadValue, build, check, require
from trinity_lib.experts import Backend
from trinity_lib.lessons import TASKS
from trinity_lib.lora import LoraConfig
from trinity_lib.optim import OptimConfig
from trinity_lib.run import require_common

Kind = Literal["sft", "dpo", "grpo"]
BY_BIAS = ("loss_free", "sign", "proportional", "smebu")
"""Balancers that need nothing but a bias, which is all that a checkpoint keeps of one."""
LENGTH = 2048
"""Tokens of a row where the checkpoint's run does not say."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what is optimised, for how long."""

    kind: Kind
    """`sft`: answers' cross entropy; `dpo`: preferences; `grpo`: verified rewards."""
    steps: int
    """Steps; of `grpo` each samples anew."""
    batch: int = 16
    """Rows of a step (`sft`), pairs (`dpo`) or prompts (`grpo`)."""
    rate: float = 1.0
    """Its peak learning rate, as a share of the run's."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("steps", "batch"):
            value = getattr(self, name)
            in_range = 1 <= value <= 1_000_000
            require(in_range, f"{self.kind}.{name}", value, "from 1 to 1,000,000")
        require(self.rate > 0, f"{self.kind}.rate", self.rate, "above zero")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """DPO."""

    beta: float = 0.1
    """How closely the policy is held to the reference."""

    def __post_init__(self) -> None:
        check(self)
        require(self.beta > 0, "dpo.beta", self.beta, "above zero")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """GRPO."""

    group: int = 8
    """Answers sampled to a prompt."""
    updates: int = 2
    """Optimiser updates on what one step samples."""
    clip: float = 0.2
    """How far a token's probability ratio may move it."""
    beta: float = 0.04
    """Weight of the KL divergence from the reference."""
    temperature: float = 1.0
    """Of sampling."""
    max_new_tokens: int = 16
    """Longest answer, its end mark included."""

    def __post_init__(self) -> None:
        check(self)
        require(self.group >= 2, "grpo.group", self.group, "at least 2: it is its own baseline")
        require(self.updates >= 1, "grpo.updates", self.updates, "at least 1")
        require(0 < self.clip < 1, "grpo.clip", self.clip, "between 0 and 1")
        require(self.beta >= 0, "grpo.beta", self.beta, "zero or more")
        require(self.temperature > 0, "grpo.temperature", self.temperature, "above zero")
        longest = self.max_new_tokens
        require(longest >= 1, "grpo.max_new_tokens", longest, "at least 1")


@dataclass(frozen=True, kw_only=True)
class PosttrainConfig:
    """Everything that decides a run of post-training."""

    init: str
    """Checkpoint folder to begin with, a run's or a released AFMoE one with its tokenizer."""
    name: str = ""
    """Name of the run; empty: posttrain, configuration hash and time."""
    seed: int = 0
    """Seed of adapters, order, questions and samples."""
    stages: tuple[Stage, ...]
    """One after another; each begins with what the one before ended with."""
    data: tuple[str, ...] = ("facts", "arithmetic", "formats", "refusals")
    """What `sft` learns: names of tasks, and JSONL files of questions with answers."""
    preferences: tuple[str, ...] = ("facts", "formats", "refusals")
    """What `dpo` learns: names of tasks, and JSONL files of pairs."""
    problems: tuple[str, ...] = ("digits",)
    """What `grpo` learns: names of tasks, and JSONL files of questions with answers."""
    sequence_length: int = LENGTH
    """Tokens of a row, into which examples are packed."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimisers, with the peak rates of pre-training."""
    rate: float = 0.1
    """Peak learning rate as a share of pre-training's (technical report, section 4)."""
    warmup: float = 0.1
    """Share of a stage's steps in which the learning rate rises; then it falls to 0."""
    lora: LoraConfig | None = None
    """Adapters to train in place of the weights, which they are merged into."""
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(method="none"))
    """The balancer; `none` freezes the selection biases as they are."""
    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Of stages `dpo`."""
    grpo: PolicyConfig = field(default_factory=PolicyConfig)
    """Of stages `grpo`."""
    z_loss: float = 1e-6
    """Weight of the z-loss on the output logits in `sft`."""
    micro_batches: int = 1
    """Pieces a step's examples are split into; gradients are accumulated."""
    questions: int = 64
    """Held-out questions of a task that are asked before and after every stage."""
    record_every: int = 1
    """Steps between records of every expert's count and bias."""
    log_every: int = 10
    """Steps between progress lines where there is no terminal."""
    threads: int = 1
    """CPU threads; results depend on it in the last bits."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; weights are fp32, on CUDA matrices multiply in bf16."""
    experts: Backend = "auto"
    """What computes the routed experts."""

    def __post_init__(self) -> None:
        check(self)
        require_common(self.name, self.seed, self.threads)
        right = "a checkpoint folder: there is nothing to post-train without one"
        require(bool(self.init), "init", self.init or None, right)
        require(len(self.stages) > 0, "stages", self.stages, "at least one of sft, dpo, grpo")
        kinds = [stage.kind for stage in self.stages]
        once = len(set(kinds)) == len(kinds)
        require(once, "stages", ", ".join(kinds), "stages named once each")
        given = {"sft": "data", "dpo": "preferences", "grpo": "problems"}
        for kind in kinds:
            name = given[kind]
            names = getattr(self, name)
            require(len(names) > 0, name, names, f"at least one: there is a stage {kind}")
            single = len(set(names)) == len(names)
            require(single, name, ", ".join(names), "tasks and files named once each")
        require(self.sequence_length >= 8, "sequence_length", self.sequence_length, "8 or more")
        require(self.rate > 0, "rate", self.rate, "above zero")
        require(0 <= self.warmup <= 1, "warmup", self.warmup, "from 0 to 1")
        right = f"none, which freezes it, or one of {', '.join(BY_BIAS)}"
        known = self.balance.method in ("none", *BY_BIAS)
        require(known, "balance", self.balance.method, right)
        require(self.z_loss >= 0, "z_loss", self.z_loss, "zero or more")
        for name in ("micro_batches", "questions", "record_every", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    @property
    def files(self) -> tuple[str, ...]:
        """The JSONL files among what is learnt."""
        every = (*self.data, *self.preferences, *self.problems)
        return tuple(dict.fromkeys(name for name in every if name not in TASKS))


def from_checkpoint(folder: Path) -> dict[str, Any]:
    """`optim`, `balance` and `sequence_length` of the run that a checkpoint belongs to.

    Empty for a released one, which does not say.
    """
    file = folder / checkpoint.RUN
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
        data = values.get("data")
        length = (
            data["sequence_length"] if isinstance(data, dict) else values["sequence_length"]
        )
        return {
            "optim": build(OptimConfig, values["optim"]),
            "balance": build(BalanceConfig, values["balance"]),
            "sequence_length": int(length),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadValue(f"{file} is of another version of this program: {error}.") from error
