"""A run from a notebook's parameters: checked first, then put where it fits."""

import ast
import dataclasses
import inspect
import shutil
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xarray as xr
from IPython import get_ipython

from trinity_lib import (
    destination,
    gpus,
    hub,
    launch_folder,
    metrics,
    ranks,
    recipes,
    record,
    resume,
    sources,
    tokenizer,
)
from trinity_lib.config import BadValue, Missing, convert, meant, override, require, to_json
from trinity_lib.mesh import ParallelConfig
from trinity_lib.record import ROOT
from trinity_lib.run import RunConfig, named
from trinity_lib.train import CACHE, RUNS, train

SETTINGS = {
    "seed": "seed",
    "balance": "balance.method",
    "balance_rate": "balance.rate",
    "num_experts": "model.router.num_experts",
    "top_k": "model.router.top_k",
    "optimizer": "optim.optimizer",
    "rsdb": "data.rsdb",
    "micro_batches": "micro_batches",
    "recompute": "recompute",
    "threads": "threads",
    "experts": "experts",
    "compile": "compile",
    "device": "device",
    "vocab_size": "model.vocab_size",
    "checkpoint_every": "checkpoint_every",
    "record_choices": "record_choices",
    "name": "name",
}
"""Parameters that are one setting each."""
ONE = ParallelConfig()
PER_NODE = 8
"""GPUs of a machine of a cluster."""


def configure(
    *,
    scale: str = "toy",
    steps: int | None = None,
    seed: int = 0,
    data: str | None = None,
    text_field: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    balance: str | None = None,
    balance_rate: float | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    rsdb: int | None = None,
    batch: int | None = None,
    micro_batches: int | None = None,
    recompute: bool | None = None,
    init: str | None = None,
    replay: str | None = None,
    record_choices: bool | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    threads: int | None = None,
    experts: str | None = None,
    compile: bool | None = None,
    device: str | None = None,
    mode: str = "auto",
    processes: int | None = None,
    shard: int | None = None,
    expert_parallel: int | None = None,
    restarts: int = 0,
    gpu: str | None = None,
    name: str = "",
) -> RunConfig:
    """The run that a notebook's parameters describe; None takes the scale's own value.

    `learning_rate` is the peak of Muon (of AdamW under `optimizer="adamw"`); other rates
    keep their ratio to it. Relative paths are looked for from the repository's root, then
    from the current folder. With `resume` the result is the run to go on with. `processes`
    ranks share a run, `shard` of them its weights (all, if left out), `expert_parallel` of
    those its experts. `mode`, `restarts` and `gpu` are `run`'s, and checked here. A Refusal,
    one sentence, for a parameter that is unknown to this call (papermill only warns of
    it), of another type, out of range, or a file that cannot be used.
    """
    given = _converted(locals())
    refuse_unknown(given)
    require(scale in recipes.SCALES, "scale", scale, f"one of {', '.join(recipes.SCALES)}")
    config = _laid_out(recipes.SCALES[scale](), given)
    _check_launch(given)
    rehearsed = destination.destination(config, mode) == "rehearsal"
    published = destination.published(config)
    if rehearsed and published:  # as it will run, elsewhere
        config = override(config, {"device": "cuda"})
    known = given["data"] and (given["tokenizer"] or given["init"])
    if published and not rehearsed and not known:
        raise BadValue(
            f"scale {scale!r} needs data and a tokenizer of {config.model.vocab_size:,} "
            f"entries; the embedded corpus serves {' and '.join(recipes.EMBEDDED)}."
        )
    changes = {path: given[p] for p, path in SETTINGS.items() if given[p] is not None}
    changes |= _text(config, given, published)
    config = override(config, changes)
    if given["learning_rate"] is not None:
        config = override(config, _rates(config, given["learning_rate"]))
    if given["steps"] is not None:
        config = recipes.with_steps(config, given["steps"])
    return _to_resume(config, given)


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    mode: str = "auto",
    restarts: int = 0,
    gpu: str | None = None,
) -> xr.DataTree:
    """Train, or rehearse, where the run fits, and return the finished run.

    One process on the CPU trains here. A run on GPUs or of several ranks is started with
    torchrun, which begins it again `restarts` times after a failure, from its last checkpoint;
    what rank 0 says is printed, and what made a rank fail is raised, in one sentence. A run
    that is too large for this machine is rehearsed as if on `gpu`s, in a process of its own.
    """
    resume = convert(bool, resume, "resume")
    where = destination.destination(config, mode)
    if where == "here":
        return train(config, runs=RUNS, resumes=resume)
    config = named(config)
    if where == "rehearsal":
        return _rehearsed(config, gpu)
    return _on_ranks(config, resume, convert(int, restarts, "restarts"))


def _on_ranks(config: RunConfig, resume: bool, restarts: int) -> xr.DataTree:
    """Train on ranks of this machine, as a shell or a cluster would."""
    folder = RUNS / config.name
    if resume and not (folder / "run.json").is_file():
        raise Missing(f"There is no run {config.name!r} to resume in {RUNS}.")
    log = folder / "ranks"
    options = ["--runs", str(RUNS), "--cache", str(CACHE), *(["--resume"] if resume else [])]
    try:
        _on(config, log, "trinity_lib.train", options, config.parallel.ranks, restarts)
    except ranks.RanksFailed as failure:
        record.failed(folder, str(failure))
        if not (folder / "run.json").is_file() and str(log) not in str(failure):
            shutil.rmtree(log)  # a run that is refused leaves nothing behind
            folder.rmdir()
        raise
    return record.open_run(folder)


def _rehearsed(config: RunConfig, gpu: str | None) -> xr.DataTree:
    """Rehearse in another process, and write the folder that starts the run elsewhere."""
    published = destination.published(config)
    if published:
        config = override(config, {"device": "cuda"})
    folder = RUNS / config.name
    options = ["--runs", str(RUNS), *(["--gpu", gpu] if gpu else [])]
    _on(config, folder / "ranks", "trinity_lib.rehearse", options, 1, 0)
    given = {"data": config.data.sources, "tokenizer": config.data.tokenizer}
    commands = launch_folder.write(
        folder / "launch",
        config,
        ranks=config.parallel.ranks,
        per_node=PER_NODE if config.device == "cuda" else config.parallel.ranks,
        name=f"{config.name}-run",
        missing=[name for name, value in given.items() if published and not value],
    )
    run = record.open_run(folder)
    print(
        f"{run.attrs['parameters_total']:,} parameters, "
        f"{run.attrs['parameters_active_with_embeddings'] / 1e9:.1f}B active\n"
        f"{run.attrs['reason']}\nTo train it: {commands.torchrun}\nor: {commands.slurm}"
    )
    return run


def _on(
    config: RunConfig, log: Path, module: str, options: list[str], processes: int, restarts: int
) -> None:
    """Run a module with `config` on processes of its own, which end with this one."""
    log.mkdir(parents=True, exist_ok=True)
    file = log / "config.json"
    file.write_text(to_json(config))
    ranks.run(
        [module, "--config", str(file), *options],
        processes=processes,
        log_folder=log,
        restarts=restarts,
        threads=config.threads,
    )


def _check_launch(given: Mapping[str, Any]) -> None:
    require(given["restarts"] >= 0, "restarts", given["restarts"], "zero or more")
    if given["gpu"] is not None:
        gpus.find(given["gpu"])


def _laid_out(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The scale's run on the device and the ranks that are asked for, or fit this machine."""
    device, processes, shard = given["device"], given["processes"], given["shard"]
    if device == "cuda":
        right = "cpu: this machine has no CUDA GPU"
        require(destination.gpus() > 0, "device", device, right)
    if device is None:
        device = "cuda" if destination.gpus() else "cpu"
    config = override(config, {"device": device})
    asked = {"processes": processes, "shard": shard, "batch": given["batch"]}
    asked["expert_parallel"] = given["expert_parallel"]
    if all(value is None for value in asked.values()):
        rehearses = given["mode"] == "rehearse"
        return config if rehearses else destination.on_this_machine(config)
    for name, value in asked.items():
        require(value is None or value >= 1, name, value, "at least 1")
    if given["micro_batches"] is not None:
        config = override(config, {"micro_batches": given["micro_batches"], "parallel": ONE})
    old = config.parallel
    total = processes or old.ranks
    shard = shard or (min(old.shard, total) if processes is None else total)
    require(total % shard == 0, "shard", shard, f"a divisor of processes ({total})")
    experts = given["expert_parallel"] or (old.experts if shard % old.experts == 0 else 1)
    right = f"a divisor of shard ({shard})"
    require(shard % experts == 0, "expert_parallel", experts, right)
    parallel = ParallelConfig(replicate=total // shard, shard=shard, experts=experts)
    return destination.laid_out(config, parallel, given["batch"])


def _to_resume(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    if not given["resume"]:
        return config
    return resume.find(config, RUNS, own_steps=given["steps"] is None)


def _text(config: RunConfig, given: Mapping[str, Any], published: bool) -> dict[str, Any]:
    """Changes for the user's own text, tokenizer, first weights and recorded choices."""
    changes: dict[str, Any] = {}
    folders = tuple(dict.fromkeys((ROOT, Path.cwd())))
    field = given["text_field"]
    if given["data"]:
        found, weights = sources.parse(given["data"], field or "text", folders)
        for source in found:
            if not source.path.startswith(sources.HUB):
                sources.files_of(source)
        changes["data.sources"] = found
        changes["phases"] = _mixed(config, weights)
    else:
        require(given["data"] is None, "data", given["data"], "a path, or left out")
        require(field is None, "text_field", field, "left out where there is no data")
    if given["init"]:
        folder = _located("init", given["init"], folders)
        shape = hub.read_config(folder)
        changes["init"] = str(folder)
        if (folder / tokenizer.FILE).is_file():
            changes["data.tokenizer"] = str(folder)
        asked = given["vocab_size"]
        right = f"the checkpoint's own {shape.vocab_size:,} entries, or left out"
        require(asked in (None, shape.vocab_size), "vocab_size", asked, right)
        changes["model.vocab_size"] = shape.vocab_size
    if given["tokenizer"]:
        path = _located("tokenizer", given["tokenizer"], folders)
        changes["data.tokenizer"] = str(path)
        if not given["init"]:
            size = _entries(path, config.model.vocab_size, given["vocab_size"], published)
            changes["model.vocab_size"] = size
    if given["replay"]:
        changes["replay"] = str(_located("replay", given["replay"], folders))
    return changes


def _mixed(config: RunConfig, weights: Mapping[str, tuple[float, ...]]) -> tuple:
    """The phases with every source's weight."""
    phases = config.phases
    for name, each in weights.items():
        right = f"one number, or one for each of the {len(phases)} phases"
        require(len(each) in (1, len(phases)), f"data weight of {name}", each, right)
    return tuple(
        dataclasses.replace(
            phase,
            mixture={name: each[i % len(each)] for name, each in weights.items()},
        )
        for i, phase in enumerate(phases)
    )


def _entries(path: Path, vocabulary: int, asked: int | None, published: bool) -> int:
    """The model's vocabulary under a tokenizer: the tokenizer's, or a published model's."""
    size = tokenizer.load(path).size
    if published:
        fits = 0.99 * vocabulary <= size <= vocabulary  # embeddings are padded a little
        right = f"a tokenizer of the model's vocabulary, {vocabulary:,} entries, not {size:,}"
        require(fits, "tokenizer", str(path), right)
        return vocabulary
    right = f"the tokenizer's own {size:,} entries, or left out"
    require(asked in (None, size), "vocab_size", asked, right)
    return size


def located(parameter: str, path: str) -> Path:
    """A path that is there, from the repository's root or the current folder; or Missing."""
    return _located(parameter, path, dict.fromkeys((ROOT, Path.cwd())))


def listed(given: Any) -> list[Any]:
    """`"256, 1024"`, one value or a list, as a list."""
    if isinstance(given, str):
        return [part.strip() for part in given.strip("[]() ").split(",") if part.strip()]
    return list(given) if isinstance(given, list | tuple) else [given]


def _located(parameter: str, path: str, folders: Iterable[Path]) -> Path:
    try:
        tried = [folder / Path(path).expanduser() for folder in folders]
        for candidate in tried:
            if candidate.exists() or (candidate.name and candidate.with_suffix("").is_dir()):
                return candidate
    except (OSError, RuntimeError) as error:  # too long for a name; no such user
        raise Missing(f"{parameter} is {path!r:.80}; it is no path: {error}.") from error
    places = " or ".join(dict.fromkeys(str(candidate.parent) for candidate in tried))
    raise Missing(f"{parameter} is {path!r}; nothing is there (looked in {places}).")


def _rates(config: RunConfig, peak: float) -> dict[str, float]:
    require(peak > 0, "learning_rate", peak, "above zero")
    optim = config.optim
    own = optim.muon_rate if optim.optimizer == "muon" else optim.adamw_rate
    return {
        "optim.muon_rate": optim.muon_rate * peak / own,
        "optim.adamw_rate": optim.adamw_rate * peak / own,
    }


def _converted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in their own types; a choice is checked here, under its parameter's name."""
    hints = inspect.get_annotations(configure, eval_str=True)
    values = {name: convert(hints[name], value, name) for name, value in given.items()}
    for name, path in SETTINGS.items():
        if values[name] is not None:
            values[name] = convert(_hint(path), values[name], name)
    return values


def _hint(path: str) -> Any:
    hint: Any = RunConfig
    for part in path.split("."):
        hint = typing.get_type_hints(hint)[part]
    return hint


def refuse_unknown(known: Iterable[str]) -> None:
    """BadValue for a parameter that papermill injected and the notebook does not have."""
    for name in injected():
        if name not in known:
            raise BadValue(
                f"there is no parameter {name!r}; this notebook has "
                f"{', '.join(known)}{meant(name, known)}."
            )


def injected() -> list[str]:
    """Names assigned in the cell papermill put in, as the kernel saw it; none elsewhere."""
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell is not None else []
    names = []
    for cell in cells:
        if cell.startswith("# Parameters"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign):
                    names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names


def describe(config: RunConfig) -> str:
    """One line on what is about to run."""
    model, router = config.model, config.model.router
    steps = sum(config.steps)
    over = config.parallel
    several = (
        f", on {over.ranks:,} ranks (weights over {over.shard}, experts over {over.experts})"
        if over.ranks > 1
        else ""
    )
    text = ", ".join(source.path for source in config.data.sources) or config.data.corpus
    return (
        f"{config.scale}: {router.num_experts} experts, top-{router.top_k}, "
        f"{model.num_layers} layers, {steps} steps of {config.phases[0].batch} x "
        f"{config.data.sequence_length} tokens, {config.optim.optimizer}, "
        f"balance {metrics.balancer(config.balance.method, config.balance.rate)}, text: {text}"
        f"{several}, on {config.device}"
    )


def run_file(run: xr.DataTree) -> Path:
    """Where a finished run's file is."""
    return RUNS / f"{run.attrs['name']}.nc"
