"""Measures of balance and learning, each with its floor; numpy and xarray alone."""

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

DEAD_SHARE = 0.01
"""An expert under this share of the mean load is dead."""
ENOUGH_TOKENS = 100
"""Mean tokens per expert a window must hold before an expert may be called dead."""
REPORT_LAMBDA = 5e-4
"""lambda of SMEBU in the technical report, section 6."""


def max_vio(load: Any) -> Any:
    """Highest over mean load, less 1, over the last axis; 0 where nothing was routed.

    Wang et al. 2024 (arXiv 2408.15664), equation 4.
    """
    return _over_mean(load, np.max) - 1.0


def min_vio(load: Any) -> Any:
    """1 less lowest over mean load, over the last axis; 0 where nothing was routed."""
    return 1.0 - _over_mean(load, np.min)


def _over_mean(load: Any, measure: Callable, empty: float = 1.0) -> Any:
    load = np.asarray(load, dtype=float)
    mean = load.mean(-1)
    return np.where(mean > 0, measure(load, axis=-1) / np.where(mean > 0, mean, 1.0), empty)


def load_entropy(load: Any) -> Any:
    """Entropy of the loads in nats, over the last axis; 0 where nothing was routed."""
    load = np.asarray(load, dtype=float)
    total = load.sum(-1, keepdims=True)
    share = load / np.where(total > 0, total, 1.0)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


def effective_experts(load: Any) -> Any:
    """exp of the load entropy: as many evenly used experts would have it."""
    return np.exp(load_entropy(load))


def dead_fraction(load: Any, share: float = DEAD_SHARE) -> Any:
    """Share of experts with less than `share` of the mean load, over the last axis.

    0 where nothing was routed: no load, no evidence.
    """
    load = np.asarray(load, dtype=float)
    return (load < share * load.mean(-1, keepdims=True)).mean(-1)


def cv(load: Any) -> Any:
    """Standard deviation over mean load, over the last axis; 0 where nothing was routed."""
    return _over_mean(load, np.std, empty=0.0)


def gini(load: Any) -> Any:
    """Gini coefficient of the loads, over the last axis; 0 where nothing was routed.

    0 is an even load, (E - 1) / E all of it on one of E experts.
    """
    load = np.sort(np.asarray(load, dtype=float), axis=-1)
    experts, total = load.shape[-1], load.sum(-1)
    weighted = (load * (2 * np.arange(1, experts + 1) - experts - 1)).sum(-1)
    return weighted / (experts * np.where(total > 0, total, 1.0))


def over_experts(function: Callable[[Any], Any], load: xr.DataArray) -> xr.DataArray:
    """A measure of loads, applied along dimension `expert`."""
    return xr.apply_ufunc(function, load, input_core_dims=[["expert"]])


@functools.cache
def sampling_floor(
    tokens: int,
    num_experts: int,
    top_k: int,
    statistic: Callable[[Any], Any] = max_vio,
    seed: int = 0,
) -> float:
    """What a measure comes to when every token picks `top_k` distinct experts at random.

    Balance cannot be better than chance: a measure counts only beyond its floor.
    Simulated, exact about distinctness, with more draws where they are cheap.
    """
    draws = max(32, min(512, 2**23 // (tokens * top_k)))
    generator = np.random.default_rng(seed)
    loads = np.zeros((draws, num_experts))
    for draw in range(draws):
        for start in range(0, tokens, 4096):
            some = min(4096, tokens - start)
            chosen = _distinct(generator, some, num_experts, top_k)
            loads[draw] += np.bincount(chosen.ravel(), minlength=num_experts)
    return float(np.mean(statistic(loads)))


def _distinct(
    generator: np.random.Generator, tokens: int, num_experts: int, top_k: int
) -> np.ndarray:
    """Distinct experts of every token, [tokens, top_k], every set as likely as any other."""
    if top_k * (top_k - 1) > num_experts:  # most draws would repeat an expert
        keys = generator.random((tokens, num_experts), dtype=np.float32)
        return np.argpartition(keys, top_k - 1, axis=1)[:, :top_k]
    chosen = np.sort(generator.integers(num_experts, size=(tokens, top_k)), axis=1)
    while (repeats := (chosen[:, 1:] == chosen[:, :-1]).any(axis=1)).any():
        again = generator.integers(num_experts, size=(int(repeats.sum()), top_k))
        chosen[repeats] = np.sort(again, axis=1)
    return chosen


def group(run: xr.DataTree, name: str) -> xr.Dataset:
    """One group of a run as a Dataset."""
    return run.children[name].to_dataset()


def router_of(run: xr.DataTree) -> tuple[int, int]:
    """(experts, top-k) of a run."""
    router = json.loads(run.attrs["config"])["model"]["router"]
    return router["num_experts"], router["top_k"]


def floor_of(run: xr.DataTree, statistic: Callable[[Any], Any] = max_vio) -> float:
    """The sampling floor of a run's last training batch."""
    tokens = int(group(run, "train")["batch_tokens"][-1])
    return sampling_floor(tokens, *router_of(run), statistic)


def rolling_load(run: xr.DataTree, tokens_per_expert: int = ENOUGH_TOKENS) -> xr.DataArray:
    """Counts summed over a trailing window of recorded steps, [step, layer, expert].

    The window is just long enough for a mean load of `tokens_per_expert`; its length is
    the attribute `window`. Steps before the first full window are left out.
    """
    count = group(run, "routing")["count"]
    mean = float(count.mean())
    window = max(1, int(np.ceil(tokens_per_expert / mean))) if mean > 0 else 1
    window = min(window, count.sizes["step"])
    total = count.cumsum("step")
    earlier = total.shift(step=window, fill_value=0)
    load = (total - earlier).isel(step=slice(window - 1, None))
    load = load.assign_coords(step=count.step[window - 1 :])
    load.attrs = {
        "long_name": f"tokens routed in {window} recorded steps",
        "units": "token",
        "window": window,
    }
    return load


def validation_load(run: xr.DataTree) -> xr.DataArray:
    """Validation tokens per expert at the last evaluation, [layer, expert]."""
    return (
        group(run, "evaluation")["count"]
        .isel(step=-1)
        .sum(["split", "domain"], keep_attrs=True)
    )


def dead_experts(run: xr.DataTree) -> xr.DataArray:
    """Share of dead experts per layer at the last evaluation.

    Warns where the mean load is too small to tell.
    """
    load = validation_load(run)
    if float(load.mean()) < ENOUGH_TOKENS:
        warnings.warn(
            f"the mean validation load is {float(load.mean()):.0f} tokens; under "
            f"{ENOUGH_TOKENS} a live expert may look dead.",
            stacklevel=2,
        )
    return over_experts(dead_fraction, load).assign_attrs(long_name="dead experts", units="1")


def losses_table(run: xr.DataTree) -> pd.DataFrame:
    """The last evaluation by domain, beside the unigram entropy and gzip -9."""
    last = group(run, "evaluation").isel(step=-1).sel(split="validation")
    table = {
        "loss, nat/token": last["loss"],
        "unigram entropy, nat/token": last["unigram_entropy"],
        "gain, nat/token": last["unigram_entropy"] - last["loss"],
        "bits per byte": last["bits_per_byte"],
        "gzip -9, bits per byte": last["gzip_bits_per_byte"],
        "tokens": last["tokens"],
        "bytes": last["bytes"],
    }
    index = pd.Index(last["domain"].values, name="domain")
    return pd.DataFrame({k: v.values for k, v in table.items()}, index=index)


def reading(run: xr.DataTree) -> str:
    """What a run shows, in sentences whose figures and verdicts come from the run."""
    parts = [_about(run), _learning(run), _balance(run), _experts(run), _heterogeneity(run)]
    notes = json.loads(run.attrs.get("warnings") or "[]")
    if run.attrs["status"] != "complete":
        parts.append(f"The run is not complete: {run.attrs['status']}.")
    return "\n\n".join([*parts, *(f"Warning: {note}" for note in notes)])


def _about(run: xr.DataTree) -> str:
    train = group(run, "train")
    seconds = float(train["seconds"].sum())
    text = (
        f"{run.attrs['scale']}, seed {run.attrs['seed']}: {train.sizes['step']} steps, "
        f"{int(train['tokens'][-1]):,} tokens in {seconds:.0f} s; "
        f"{int(run.attrs['parameters_total']):,} parameters, "
        f"{int(run.attrs['parameters_active_with_embeddings']):,} of them active."
    )
    balance = json.loads(run.attrs["config"])["balance"]
    if balance["method"] == "smebu" and balance["rate"] != REPORT_LAMBDA:
        text += (
            f" SMEBU's lambda is {balance['rate']:g}, time-compressed from the report's "
            f"{REPORT_LAMBDA:g}, which {train.sizes['step']} steps could not show."
        )
    return text


def _learning(run: xr.DataTree) -> str:
    rows = []
    for domain, row in losses_table(run).iterrows():
        gain = row["gain, nat/token"]
        against = row["bits per byte"] - row["gzip -9, bits per byte"]
        rows.append(
            f"{domain}: {row['loss, nat/token']:.2f} nat/token, {abs(gain):.2f} "
            f"{'below' if gain > 0 else 'above'} the unigram entropy; "
            f"{row['bits per byte']:.2f} bits per byte, {abs(against):.2f} "
            f"{'fewer' if against < 0 else 'more'} than gzip -9."
        )
    return "Validation. " + " ".join(rows)


def _balance(run: xr.DataTree) -> str:
    steps = group(run, "layers").sizes["step"]
    late = group(run, "layers")["max_vio"].isel(step=slice(-max(1, steps // 5), None))
    mean, floor = float(late.mean()), floor_of(run)
    method = json.loads(run.attrs["config"])["balance"]["method"]
    return (
        f"Balance ({method}). MaxVio is {mean:.2f} over the last {late.sizes['step']} steps "
        f"(mean of layers; worst layer {float(late.mean('step').max()):.2f}); perfectly "
        f"uniform routing of this batch would show {floor:.2f}, so the excess is "
        f"{mean - floor:.2f}."
    )


def _experts(run: xr.DataTree) -> str:
    dead = dead_experts(run)
    used = over_experts(effective_experts, validation_load(run))
    by_layer = ", ".join(f"{float(d):.1%} in layer {int(d.layer)}" for d in dead)
    found = f"{float(dead.mean()):.1%} of experts are dead ({by_layer})"
    if float(dead.max()) == 0:
        found = "no expert is dead"
    return (
        f"On validation {found}; {float(used.mean()):.1f} of {router_of(run)[0]} experts are "
        "effectively in use."
    )


def _heterogeneity(run: xr.DataTree) -> str:
    train = group(run, "train")
    config = json.loads(run.attrs["config"])
    if config["micro_batches"] == 1:
        return "BatchHet is 0 by definition: a step is one micro-batch."
    by_phase = train["batch_het"].groupby(train["phase"]).mean()
    phases = ", ".join(f"{float(v):.3f} in phase {int(v.phase) + 1}" for v in by_phase)
    order = (
        f"RSDB of {config['data']['rsdb']}" if config["data"]["rsdb"] else "packing in order"
    )
    return f"BatchHet over {config['micro_batches']} micro-batches ({order}): {phases} nat."
