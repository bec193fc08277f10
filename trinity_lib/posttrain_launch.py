"""Post-training from a notebook's parameters: checked first, then run here."""

import inspect
import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import xarray as xr

from trinity_lib import checkpoint, hub, launch, metrics, posttrain, tokenizer
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import BadValue, Missing, convert, meant, require
from trinity_lib.lessons import TASKS
from trinity_lib.lora import LoraConfig, Part
from trinity_lib.optim import OptimConfig
from trinity_lib.posttrain_config import (
    BY_BIAS,
    LENGTH,
    Kind,
    PosttrainConfig,
    Stage,
    from_checkpoint,
)
from trinity_lib.train import RUNS

STEPS: dict[Kind, int] = {"sft": 120, "dpo": 30, "grpo": 20}
"""Steps of a stage where nothing else is asked for: what shows at toy scale."""
BATCH: dict[Kind, int] = {"sft": 16, "dpo": 16, "grpo": 16}
"""Rows, pairs, prompts of a step."""


def configure(
    *,
    init: str | None = None,
    stages: str = "sft, dpo, grpo",
    steps: Any = "",
    batch: Any = "",
    data: str | None = None,
    preferences: str | None = None,
    problems: str | None = None,
    sequence_length: int | None = None,
    lora: bool = False,
    lora_rank: int = 8,
    lora_on: str = "attention, experts",
    balance: str = "on",
    learning_rate: float | None = None,
    questions: int = 64,
    seed: int = 0,
    threads: int = 1,
    device: str | None = None,
    name: str = "",
    resume: bool = False,
) -> PosttrainConfig:
    """What a notebook's parameters ask for; None and "" take what the checkpoint's run had.

    `learning_rate` is the peak of Muon, of AdamW where it does all, of the adapters with
    `lora`; None is a tenth of pre-training's. `resume` is `posttrain.run`'s. A Refusal, one
    sentence, for a parameter that is unknown to this call, of another type, out of range, or
    a file that cannot be used.
    """
    launch.refuse_unknown(inspect.signature(configure).parameters)
    require(init not in (None, ""), "init", init, "a checkpoint folder to begin with")
    folder = _checkpoint(convert(str, init, "init"))
    own = from_checkpoint(folder)
    if convert(bool, resume, "resume"):
        require(bool(name), "name", name, "the run to go on with, where resume is true")
    optimisers = own.get("optim", OptimConfig())
    adapters = _adapters(lora, lora_rank, lora_on)
    length = convert(int | None, sequence_length, "sequence_length")
    length = own.get("sequence_length", LENGTH) if length is None else length
    peak = convert(float | None, learning_rate, "learning_rate")
    given: dict[str, Any] = {
        "data": _materials("data", data),
        "preferences": _materials("preferences", preferences),
        "problems": _materials("problems", problems),
        "sequence_length": length,
        "rate": None if peak is None else _share(peak, optimisers, adapters),
    }
    return PosttrainConfig(
        init=str(folder),
        stages=_stages(stages, steps, batch),
        optim=optimisers,
        lora=adapters,
        balance=_balance(balance, own.get("balance")),
        questions=questions,
        seed=seed,
        threads=threads,
        device=device_of(device),
        name=name,
        **{key: value for key, value in given.items() if value is not None},
    )


def describe(config: PosttrainConfig) -> str:
    """One line on what is about to run."""
    shape = hub.read_config(Path(config.init))
    stages = ", ".join(f"{s.kind} {s.steps} x {s.batch}" for s in config.stages)
    trained = "all weights"
    if config.lora is not None:
        trained = f"adapters of rank {config.lora.rank} on {', '.join(config.lora.on)}"
    frozen = config.balance.method == "none"
    balance = (
        "frozen" if frozen else metrics.balancer(config.balance.method, config.balance.rate)
    )
    return (
        f"{config.init}: {shape.router.num_experts} experts, top-{shape.router.top_k}, "
        f"{shape.num_layers} layers; {stages}; {trained}, balance {balance}, "
        f"{config.rate:g} of the peak learning rate"
    )


def _checkpoint(init: str) -> Path:
    """A folder, or OWNER/NAME on the hub; Missing unless it holds a model and a tokenizer."""
    try:
        folder = launch.located("init", init)
    except Missing:
        try:
            folder = hub.local(init)
        except Missing as second:
            raise Missing(f"init: {second}") from second
        if not folder.exists():
            raise
    hub.inspect(folder)
    if not (folder / tokenizer.FILE).is_file():
        raise BadValue(f"init is {init!r}, which has no {tokenizer.FILE}.")
    return folder


def device_of(device: str | None) -> Literal["cpu", "cuda"]:
    """The device that is asked for, else a GPU where there is one."""
    there = torch.cuda.is_available()
    if convert(str | None, device, "device") is None:
        return "cuda" if there else "cpu"
    right = "cpu: this machine has no CUDA GPU"
    require(there or device != "cuda", "device", device, right)
    return convert(Literal["cpu", "cuda"], device, "device")


def _adapters(lora: bool, rank: int, on: str) -> LoraConfig | None:
    """Adapters that double their product, or None."""
    rank = convert(int, rank, "lora_rank")
    parts = tuple(convert(Part, part, "lora_on") for part in launch.listed(on))
    adapters = LoraConfig(on=parts, rank=rank, alpha=max(2.0 * rank, 1.0))
    return adapters if convert(bool, lora, "lora") else None


def _stages(stages: str, steps: Any, batch: Any) -> tuple[Stage, ...]:
    kinds, right = launch.listed(stages), f"some of {', '.join(get_args(Kind))}"
    require(len(kinds) > 0, "stages", stages, right)
    for kind in kinds:
        hint = f"{right}, not {kind!r}{meant(kind, get_args(Kind))}"
        require(kind in get_args(Kind), "stages", stages, hint)
    each = {
        name: [convert(int, value, name) for value in launch.listed(given)]
        for name, given in (("steps", steps), ("batch", batch))
        if given not in (None, "")
    }
    for name, values in each.items():
        right = f"one number, or one for each of the {len(kinds)} stages"
        require(len(values) in (1, len(kinds)), name, values, right)
    steps_of = each.get("steps", [STEPS[kind] for kind in kinds])
    batch_of = each.get("batch", [BATCH[kind] for kind in kinds])
    return tuple(
        Stage(
            kind=kind,
            steps=steps_of[i % len(steps_of)],
            batch=batch_of[i % len(batch_of)],
        )
        for i, kind in enumerate(kinds)
    )


def _materials(parameter: str, given: str | None) -> tuple[str, ...] | None:
    """Names of tasks, and paths of files that are there."""
    if given is None:
        return None
    names = launch.listed(convert(str, given, parameter))
    right = f"some of {', '.join(TASKS)}, or .jsonl files"
    require(len(names) > 0, parameter, given, right)
    found = []
    for name in names:
        if name not in TASKS:
            require(name.endswith(".jsonl"), parameter, name, right)
            name = str(launch.located(parameter, name))
        found.append(name)
    return tuple(found)


def _balance(balance: str, own: BalanceConfig | None) -> BalanceConfig:
    """Frozen, or the run's own balancer where a bias is all of it, else SMEBU as published."""
    if convert(Literal["frozen", "on"], balance, "balance") == "frozen":
        return BalanceConfig(method="none")
    if own is not None and own.method in BY_BIAS:
        return own
    return BalanceConfig()


def _share(peak: float, optimisers: OptimConfig, adapters: LoraConfig | None) -> float:
    require(peak > 0, "learning_rate", peak, "above zero")
    if adapters is not None:
        return peak / (optimisers.adamw_rate * adapters.rate)
    muon = optimisers.optimizer == "muon"
    return peak / (optimisers.muon_rate if muon else optimisers.adamw_rate)


def run(config: PosttrainConfig, *, resume: bool = False) -> xr.DataTree:
    """Post-train here, into the repository's `runs`."""
    return posttrain.run(config, runs=RUNS, resume=convert(bool, resume, "resume"))


def checkpoints(run: xr.DataTree) -> str:
    """Where a finished run's checkpoints are, one a line, the last stage's last."""
    manifests = (RUNS / run.attrs["name"]).glob(f"*/{checkpoint.MANIFEST}")
    folders = sorted((_step(file), file.parent) for file in manifests)
    return "\n".join(f"checkpoint: {folder}" for _, folder in folders)


def _step(manifest: Path) -> int:
    return json.loads(manifest.read_text())["step"]
