"""What a run holds while it lasts: built before its first step, saved, and restored."""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity_lib import (
    balance,
    balancers,
    checkpoint,
    data,
    disk,
    evaluate,
    hub,
    optim,
    probe,
    replay,
    resume,
    rows,
    tokenizer,
)
from trinity_lib.allocator import keep_memory
from trinity_lib.checkpoint import State
from trinity_lib.config import BadValue, Refusal, differences, require, to_json
from trinity_lib.data import Loaded
from trinity_lib.experts import backend_info, use_backend
from trinity_lib.model import Output, Trinity, count_parameters
from trinity_lib.progress import Progress
from trinity_lib.record import Claim, Writer, provenance, read_attributes
from trinity_lib.run import RunConfig, named
from trinity_lib.tokenizer import Vocabulary

REMEMBERED_LOSSES = 50
"""Losses that the guard against jumps looks back on."""
BALANCER, LOOKED = "balancer.", "looked."
"""What names of tensors in a checkpoint begin with."""


@dataclass
class Session:
    """What a run holds while it lasts."""

    config: RunConfig
    model: Trinity
    forward: Callable[..., Output]
    """The model, compiled where that was asked for."""
    balancer: balance.Balancer
    optimizers: list[torch.optim.Optimizer]
    rows: rows.Rows
    held_out: dict[str, evaluate.Domain]
    probed: probe.Probe
    vocabulary: Vocabulary
    choices: replay.Choices | None
    writer: Writer
    progress: Progress
    step: int = 0
    tokens: int = 0
    flushed: float = field(default_factory=time.monotonic)
    losses: list[float] = field(default_factory=list)
    looked: probe.Look | None = None
    """The last look at the probe."""


def start(config: RunConfig, runs: Path, cache: Path, *, resumes: bool = False) -> Session:
    """Data, model and writer of a run: a new one, or one that goes on from its checkpoint.

    Everything that can be refused is, before a step is trained; a new run that is refused
    leaves nothing behind.
    """
    config = named(config)
    _require_memory(config)
    try:
        claim = Claim(runs / config.name, resume=resumes)
    except OSError as error:
        if isinstance(error, Refusal):
            raise
        raise BadValue(f"{runs} cannot be written: {error.strerror}.") from error
    try:
        return _build(config, claim, cache)
    except BaseException as error:
        claim.release()
        if isinstance(error, Refusal):
            raise
        if disk.is_full(error):
            raise disk.NoSpace(f"The disk of {runs} or {cache} is full: free some.") from error
        if isinstance(error, OSError) and error.filename is not None:
            raise BadValue(f"{error.filename} cannot be used: {error.strerror}.") from error
        raise


def _build(config: RunConfig, claim: Claim, cache: Path) -> Session:
    old = resume.configuration(claim.folder) if claim.begun else None
    step = resume.compare(config, old, claim.folder) if old else 0
    latest = checkpoint.newest(claim.folder) if step else None
    if config.init and not claim.begun:
        checkpoint.check(Path(config.init))
    loaded = data.load(config.data, config.model.vocab_size, cache)
    facts = replay.hashes(loaded.sha256, loaded.vocabulary.sha256)
    if claim.begun:
        _require_same_text(claim.folder, facts)
        _require_same_backend(claim.folder, config)
    choices = replay.load(config, facts) if config.replay else None
    stream = rows.Stream(loaded.train, config.seed)
    for phase in config.phases:
        require(bool(phase.mixture), "phase.mixture", phase.mixture, "shares by domain")
        stream.mix(phase.mixture)
    held_out = _held_out(config, loaded)
    probed = probe.choose(held_out, config.probe_tokens)

    model = new_model(config, loaded.vocabulary) if latest is None else _loaded(config, latest)
    optimizers = optim.build(model, config.optim)
    _require_space(config, claim.folder, model, optimizers)
    balancer = new_balancer(config)
    balancer.bias_LE = torch.stack([router.bias_E for router in model.routers()]).clone()
    writer = Writer(
        claim.folder,
        {**_attributes(config, loaded, claim.begun), **facts},
        _coordinates(config, list(held_out), int(probed.valid_T.sum())),
        claim=claim,
        resume_at=step if claim.begun else None,
    )
    writer.table("probe_tokens", probed.table)
    session = Session(
        config=config,
        model=model,
        forward=torch.compile(model.forward, dynamic=False) if config.compile else model,
        balancer=balancer,
        optimizers=optimizers,
        rows=rows.Rows(stream, config.data.sequence_length, config.data.rsdb, config.seed),
        held_out=held_out,
        probed=probed,
        vocabulary=loaded.vocabulary,
        choices=choices,
        writer=writer,
        progress=Progress(sum(config.steps), config.log_every, config.name, step),
    )
    if latest is not None:
        _restore(session, checkpoint.load_state(latest))
    for warning in (*loaded.warnings, *_fallback(config)):
        warnings.warn(warning, stacklevel=4)
    return session


def new_balancer(config: RunConfig) -> balance.Balancer:
    """The run's balancer before its first step."""
    return balancers.build(
        config.balance,
        num_layers=len(config.model.moe_layers),
        num_experts=config.model.router.num_experts,
        top_k=config.model.router.top_k,
        vocab_size=config.model.vocab_size,
        seed=config.seed,
        device=config.device,
    )


def new_model(config: RunConfig, vocabulary: Vocabulary | None = None) -> Trinity:
    """The run's first weights: a checkpoint's, or drawn in fp32 on the CPU, on any device."""
    if config.init:
        folder = Path(config.init)
        model = checkpoint.load(folder)
        _require_alike(config, folder, vocabulary)
    else:
        with torch.device("meta"):  # the modules' own initialisation would use the global RNG
            model = Trinity(config.model)
        model = model.to_empty(device="cpu")
        model.initialise(torch.Generator().manual_seed(config.seed))
    return _placed(config, model)


def state_of(session: Session) -> State:
    """What a checkpoint holds beside the weights, so that `start` can go on to the bit."""
    facts, tokens, ends = session.rows.state()
    tensors = {
        **{f"{BALANCER}{k}": v for k, v in session.balancer.state().items()},
        "rows.tokens": torch.from_numpy(tokens.astype(np.int32)),
        "rows.ends": torch.from_numpy(ends),
        **optim.state_tensors(session.model, session.optimizers),
    }
    if session.looked is not None:  # churn is counted from one look to the next
        tensors |= {
            f"{LOOKED}{k}": torch.from_numpy(v) for k, v in session.looked._asdict().items()
        }
    counters = {"step": session.step, "tokens": session.tokens}
    losses = session.losses[-REMEMBERED_LOSSES:]
    return State({**counters, "losses": losses, "rows": facts}, tensors)


def _restore(session: Session, state: State) -> None:
    facts, tensors = state
    session.step, session.tokens = facts["step"], facts["tokens"]
    session.losses = list(facts["losses"])
    session.balancer.load_state(under(BALANCER, tensors))
    if looked := under(LOOKED, tensors):
        session.looked = probe.Look(**{k: v.numpy() for k, v in looked.items()})
    unread, ends = tensors["rows.tokens"].numpy(), tensors["rows.ends"].numpy()
    session.rows.restore(facts["rows"], unread, ends)
    optim.load_state_tensors(session.model, session.optimizers, tensors)


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _loaded(config: RunConfig, folder: Path) -> Trinity:
    return _placed(config, checkpoint.load(folder))


def _placed(config: RunConfig, model: Trinity) -> Trinity:
    """On the run's device, in its dtype; selection biases stay fp32."""
    model = model.to(device=config.device, dtype=getattr(torch, config.dtype))
    for router in model.routers():
        router.bias_E = router.bias_E.float()
    use_backend(model, config.experts, products_dtype(config))
    return model


def products_dtype(config: RunConfig) -> torch.dtype:
    """What matrices are multiplied in: bf16 on CUDA, the weights' dtype on the CPU."""
    return torch.bfloat16 if config.device == "cuda" else getattr(torch, config.dtype)


def _held_out(config: RunConfig, loaded: Loaded) -> dict[str, evaluate.Domain]:
    length, most = config.data.sequence_length, config.data.validation_rows
    return {
        name: evaluate.domain(
            name, rows.validation(name, documents, length, most), loaded.vocabulary
        )
        for name, documents in loaded.validation.items()
    }


def _require_alike(config: RunConfig, folder: Path, vocabulary: Vocabulary | None) -> None:
    unused = ("load_balance_coeff", "max_positions")
    changed = differences(hub.read_config(folder), config.model, unused)
    if changed:
        raise BadValue(
            f"init is {config.init!r}, a checkpoint of another model: {'; '.join(changed)}."
        )
    has_one = (folder / tokenizer.FILE).is_file()
    if not has_one and not config.data.tokenizer:
        raise BadValue(f"init is {config.init!r}, which has no tokenizer.json: give tokenizer.")
    theirs = checkpoint.load_vocabulary(folder) if has_one else vocabulary
    if theirs is not None and vocabulary is not None and theirs.sha256 != vocabulary.sha256:
        raise BadValue(
            f"init is {config.init!r}, whose tokenizer is another than this run's: give "
            f"tokenizer={config.init}."
        )


def _require_same_text(folder: Path, facts: dict[str, str]) -> None:
    old = read_attributes(folder)
    for name, value in facts.items():
        if old.get(name) != value:
            what = name.removesuffix("_sha256")
            raise BadValue(
                f"The run {folder.name!r} cannot be resumed: its {what} has changed "
                f"({name} is {value[:12]} and was {str(old.get(name))[:12]})."
            )


def _fallback(config: RunConfig) -> list[str]:
    """A sentence where `auto` would have computed the experts with a faster backend."""
    dtype = products_dtype(config)
    info = backend_info(config.experts, config.device, dtype)
    wanted = "megablocks" if config.device == "cuda" else "native"
    if config.experts != "auto" or info["backend"] == wanted or dtype == torch.float64:
        return []
    return [f"{info['backend']} computes the experts, not {wanted}: {info[wanted]}."]


def _require_same_backend(folder: Path, config: RunConfig) -> None:
    old = json.loads(read_attributes(folder)["experts_backend"])["backend"]
    now = backend_info(config.experts, config.device, products_dtype(config))["backend"]
    if old != now:
        raise BadValue(
            f"The run {folder.name!r} cannot be resumed to the bit: {old} computed its "
            f"experts, and here {now} would; `python -m trinity_lib.experts` says why."
        )


def _require_memory(config: RunConfig) -> None:
    """Weights, gradients and momentum must fit, whatever the rest takes."""
    width = 8 if config.dtype == "float64" else 4
    needed = 3 * width * count_parameters(config.model).total
    there, what = memory(config.device)
    if needed > there:
        raise BadValue(
            f"scale {config.scale!r} needs {needed / 1e9:,.0f} GB for weights, gradients and "
            f"momentum; this machine has {there / 1e9:,.0f} GB of {what}: take a smaller scale."
        )


def memory(device: str) -> tuple[int, str]:
    """Bytes of the GPU's memory or of the machine's, and what to call it."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory, "GPU memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory"


def _require_space(
    config: RunConfig, folder: Path, model: Trinity, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Room for every checkpoint that is kept and one being written, and recorded choices."""
    one = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    one += optim.state_bytes(optimizers)
    copies = len(config.phases) + config.keep + 1
    needed = copies * one
    if config.record_choices:
        layers, top_k = len(config.model.moe_layers), config.model.router.top_k
        needed += 4 * layers * top_k * sum(phase.tokens for phase in config.phases)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    what = f"{copies} checkpoints of {one / 1e6:,.1f} MB"
    disk.require_space(folder, needed - there, what)


def _coordinates(config: RunConfig, domains: list[str], probed: int) -> dict[str, Any]:
    return {
        "layer": list(config.model.moe_layers),
        "expert": np.arange(config.model.router.num_experts),
        "token": np.arange(most_tokens(config) if config.record_choices else 0),
        "probe_token": np.arange(probed),
        "choice": np.arange(config.model.router.top_k),
        "split": ["validation"],
        "domain": domains,
    }


def most_tokens(config: RunConfig) -> int:
    """Tokens of the schedule's largest batch."""
    batches = [rows for p in config.phases for rows in (p.batch, *(p.larger_batch or ())[1:])]
    return max(batches) * config.data.sequence_length


def _attributes(config: RunConfig, loaded: Loaded, begun: bool) -> dict[str, Any]:
    count = count_parameters(config.model)
    text = to_json(config)
    about = {
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "device": config.device,
        "threads": config.threads,
        "experts_backend": backend_info(config.experts, config.device, products_dtype(config)),
        "allocator": keep_memory() if config.device == "cpu" else "torch's CUDA allocator",
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters_active_with_embeddings": count.active_with_embeddings,
        "warnings": [*loaded.warnings, *_fallback(config)],
        "documents": loaded.summary,
        "text": [str(source.path) for source in config.data.sources] or config.data.corpus,
    }
    if config.init and not begun:
        about["init_sha256"] = checkpoint.sha256(Path(config.init))
    return {**provenance(), **about}
