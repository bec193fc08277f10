"""What a run holds while it lasts: built before its first step, saved, and restored."""

import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
    parallel,
    planted,
    preflight,
    probe,
    replay,
    resume,
    rows,
    shards,
)
from trinity_lib.allocator import keep_memory
from trinity_lib.checkpoint import State
from trinity_lib.config import BadValue, Refusal, require, to_json
from trinity_lib.data import Loaded
from trinity_lib.experts import backend_info, use_backend
from trinity_lib.mesh import Layout
from trinity_lib.model import Output, Trinity, count_parameters
from trinity_lib.parallel import Sharded
from trinity_lib.progress import Progress
from trinity_lib.record import Claim, Onlooker, Writer, provenance
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
    sharded: Sharded | None
    """The model's pieces, where the run has several ranks."""
    balancer: balance.Balancer
    optimizers: list[torch.optim.Optimizer]
    rows: rows.Rows
    held_out: dict[str, evaluate.Domain]
    probed: probe.Probe
    vocabulary: Vocabulary
    choices: replay.Choices | None
    writer: Writer | Onlooker
    progress: Progress
    step: int = 0
    tokens: int = 0
    flushed: float = field(default_factory=time.monotonic)
    losses: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    """Tokens per second of every step of this process."""
    looked: probe.Look | None = None
    """The last look at the probe."""
    saving: shards.Saving | None = None
    """A checkpoint of several ranks that is being written."""

    @property
    def layout(self) -> Layout | None:
        """This process's place among the ranks of the run."""
        return None if self.sharded is None else self.sharded.layout

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What this process holds of every parameter."""
        if self.sharded is not None:
            return self.sharded.weights
        return dict(self.model.named_parameters())


class Claimed(NamedTuple):
    """A run's folder, and who may write it."""

    folder: Path
    begun: bool
    """Whether the run was begun before."""
    claim: Claim | None
    """Rank 0's alone."""

    def release(self) -> None:
        """Give the run up."""
        if self.claim is not None:
            self.claim.release()


def start(
    config: RunConfig,
    runs: Path,
    cache: Path,
    *,
    resumes: bool = False,
    layout: Layout | None = None,
) -> Session:
    """Data, model and writer of a run: a new one, or one that goes on from its checkpoint.

    Everything that can be refused is, before a step is trained; a new run that is refused
    leaves nothing behind. With a `layout` this process is one of several ranks,
    and the run has a name that all of them know.
    """
    config = named(config)
    preflight.require_memory(config)
    claim = _claimed(runs / config.name, resumes, layout)
    try:
        return _build(config, claim, cache, layout)
    except BaseException as error:
        claim.release()
        if isinstance(error, Refusal):
            raise
        if disk.is_full(error):
            raise disk.NoSpace(f"The disk of {runs} or {cache} is full: free some.") from error
        if isinstance(error, OSError) and error.filename is not None:
            raise BadValue(f"{error.filename} cannot be used: {error.strerror}.") from error
        raise


def _claimed(folder: Path, resumes: bool, layout: Layout | None) -> Claimed:
    """Rank 0 claims the run; the others hear of it."""
    claim = None
    if layout is None or layout.rank == 0:
        try:
            claim = Claim(folder, resume=resumes)
        except OSError as error:
            if isinstance(error, Refusal):
                raise
            raise BadValue(f"{folder.parent} cannot be written: {error.strerror}.") from error
    begun = claim is not None and claim.begun
    return Claimed(folder, begun if layout is None else layout.shared(begun), claim)


def _build(config: RunConfig, claim: Claimed, cache: Path, layout: Layout | None) -> Session:
    old = resume.configuration(claim.folder) if claim.begun else None
    part = (0, 1) if layout is None else (layout.rank, layout.ranks)
    step = resume.compare(config, old, claim.folder, *part) if old else 0
    latest = checkpoint.newest(claim.folder) if step else None
    if config.init and not claim.begun:
        checkpoint.check(Path(config.init))
    with contextlib.nullcontext() if layout is None else layout.leaders_first():
        loaded = data.load(config.data, config.model.vocab_size, cache)
    facts = replay.hashes(loaded.sha256, loaded.vocabulary.sha256)
    if claim.begun:
        preflight.require_same_text(claim.folder, facts)
        preflight.require_same_backend(claim.folder, config)
    choices = replay.load(config, facts) if config.replay else None
    stream = rows.Stream(loaded.train, config.seed)
    for phase in config.phases:
        require(bool(phase.mixture), "phase.mixture", phase.mixture, "shares by domain")
        stream.mix(phase.mixture)
    held_out = _held_out(config, loaded)
    probed = probe.choose(held_out, config.probe_tokens)

    sharded = None if layout is None else new_sharded(config, layout, loaded.vocabulary)
    if sharded is not None:
        model = sharded.model
    elif latest is None or shards.are_in(latest):
        model = new_model(config, loaded.vocabulary)
    else:
        model = _loaded(config, latest)
    optimizers = _optimizers(config, model, sharded)
    if claim.claim is not None:
        preflight.require_space(config, claim.folder)
    balancer = new_balancer(config, layout)
    balancer.bias_LE = torch.stack([router.bias_E for router in model.routers()]).clone()
    attributes = {**_attributes(config, loaded, claim.begun), **facts}
    coordinates = _coordinates(config, list(held_out), int(probed.valid_T.sum()))
    writer = _writer(claim, attributes, coordinates, step)
    writer.table("probe_tokens", probed.table)
    if claim.claim is not None and config.data.corpus == "planted":
        planted.write(planted.world(config.data.world), claim.folder)
    session = Session(
        config=config,
        model=model,
        sharded=sharded,
        forward=torch.compile(model.forward, dynamic=False) if config.compile else model,
        balancer=balancer,
        optimizers=optimizers,
        rows=rows.Rows(stream, config.data.sequence_length, config.data.rsdb, config.seed),
        held_out=held_out,
        probed=probed,
        vocabulary=loaded.vocabulary,
        choices=choices,
        writer=writer,
        progress=_progress(config, step, layout),
    )
    if latest is not None:
        _restore(session, _state_in(latest, session))
    for warning in (*loaded.warnings, *preflight.fallback(config)):
        warnings.warn(warning, stacklevel=4)
    return session


def _progress(config: RunConfig, step: int, layout: Layout | None) -> Progress:
    silent = layout is not None and layout.rank > 0
    return Progress(sum(config.steps), config.log_every, config.name, step, silent=silent)


def _writer(
    claim: Claimed, attributes: dict[str, Any], coordinates: dict[str, Any], step: int
) -> Writer | Onlooker:
    """Rank 0 writes the run, from `step` on where it was begun before."""
    if claim.claim is None:
        return Onlooker(claim.folder)
    at = step if claim.begun else None
    return Writer(claim.folder, attributes, coordinates, claim=claim.claim, resume_at=at)


def _optimizers(
    config: RunConfig, model: Trinity, sharded: Sharded | None
) -> list[torch.optim.Optimizer]:
    if sharded is None:
        return optim.build(model, config.optim)
    return optim.build(model, config.optim, sharded.weights, parallel.Owners(sharded))


def new_balancer(config: RunConfig, layout: Layout | None = None) -> balance.Balancer:
    """The run's balancer before its first step."""
    made = balancers.build(
        config.balance,
        num_layers=len(config.model.moe_layers),
        num_experts=config.model.router.num_experts,
        top_k=config.model.router.top_k,
        vocab_size=config.model.vocab_size,
        seed=config.seed,
        device=config.device,
        rank=0 if layout is None else layout.rank,
        ranks=config.parallel.ranks,
    )
    if layout is not None:
        made.together = layout.sum
    return made


def new_sharded(
    config: RunConfig, layout: Layout, vocabulary: Vocabulary | None = None
) -> Sharded:
    """`new_model` over ranks, each of which has its own rows of the same first weights."""
    sharded = parallel.shard(
        config.model,
        layout,
        dtype=getattr(torch, config.dtype),
        products=preflight.products_dtype(config),
    )
    if config.init:
        folder = Path(config.init)
        checkpoint.check(folder)
        preflight.require_alike(config, folder, vocabulary)
        hub.load(folder, into=sharded)
    else:
        parallel.initialise(sharded, torch.Generator().manual_seed(config.seed))
    use_backend(sharded.model, config.experts, preflight.products_dtype(config))
    return sharded


def new_model(config: RunConfig, vocabulary: Vocabulary | None = None) -> Trinity:
    """The run's first weights: a checkpoint's, or drawn in fp32 on the CPU, on any device."""
    if config.init:
        folder = Path(config.init)
        model = checkpoint.load(folder)
        preflight.require_alike(config, folder, vocabulary)
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
        **optim.state_tensors(session.weights, session.optimizers),
    }
    if session.looked is not None:  # churn is counted from one look to the next
        tensors |= {
            f"{LOOKED}{k}": torch.from_numpy(v) for k, v in session.looked._asdict().items()
        }
    counters = {"step": session.step, "tokens": session.tokens}
    losses = session.losses[-REMEMBERED_LOSSES:]
    return State({**counters, "losses": losses, "rows": facts}, tensors)


def _state_in(folder: Path, session: Session) -> State:
    """What a verified checkpoint holds beside the weights, whoever wrote it, for this process.

    Weights that are there in shards come into the model too.
    """
    if shards.are_in(folder):
        return shards.load(folder, session.weights, session.sharded)
    if session.sharded is None:
        return checkpoint.load_state(folder)
    hub.load(folder, into=session.sharded)
    return checkpoint.load_state(folder, session.sharded.pieces)


def _restore(session: Session, state: State) -> None:
    facts, tensors = state
    session.step, session.tokens = facts["step"], facts["tokens"]
    session.losses = list(facts["losses"])
    session.balancer.load_state(under(BALANCER, tensors))
    session.model.load_bias(session.balancer.bias_LE)
    if looked := under(LOOKED, tensors):
        session.looked = probe.Look(**{k: v.numpy() for k, v in looked.items()})
    unread, ends = tensors["rows.tokens"].numpy(), tensors["rows.ends"].numpy()
    session.rows.restore(facts["rows"], unread, ends)
    optim.load_state_tensors(session.weights, session.optimizers, tensors)


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
    use_backend(model, config.experts, preflight.products_dtype(config))
    return model


def _held_out(config: RunConfig, loaded: Loaded) -> dict[str, evaluate.Domain]:
    length, most = config.data.sequence_length, config.data.validation_rows
    return {
        name: evaluate.domain(
            name, rows.validation(name, documents, length, most), loaded.vocabulary
        )
        for name, documents in loaded.validation.items()
    }


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
        "experts_backend": backend_info(
            config.experts, config.device, preflight.products_dtype(config)
        ),
        "allocator": keep_memory() if config.device == "cpu" else "torch's CUDA allocator",
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters_active_with_embeddings": count.active_with_embeddings,
        "warnings": [*loaded.warnings, *preflight.fallback(config)],
        "documents": loaded.summary,
        "text": [str(source.path) for source in config.data.sources] or config.data.corpus,
    }
    if config.init and not begun:
        about["init_sha256"] = checkpoint.sha256(Path(config.init))
    return {**provenance(), **about}
