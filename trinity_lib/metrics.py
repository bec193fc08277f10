"""What a run shows: its balance and its learning, beside their floors. No torch."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib.loads import (
    ENOUGH_TOKENS,
    dead_fraction,
    effective_experts,
    max_vio,
    over_experts,
    sampling_floor,
    warn_if_few,
)

REPORT_LAMBDA = 5e-4
"""lambda of SMEBU in the technical report, section 6."""
RATELESS = ("none", "quantile", "bip", "sinkhorn", "expert_choice", "hash")
"""Balancers without a step size."""


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
    warn_if_few(float(load.mean()), "validation", stacklevel=3)
    return over_experts(dead_fraction, load).assign_attrs(long_name="dead experts", units="1")


def losses_table(run: xr.DataTree) -> pd.DataFrame:
    """The last evaluation by domain, beside the unigram entropy and gzip -9.

    Of a rehearsal, GB on a GPU at the moments of a step, planned and traced.
    """
    if run.attrs["status"] == "rehearsed":
        held = group(run, "rehearsed_memory").sum("part", skipna=False) / 1e9
        return pd.DataFrame({f"{n}, GB a GPU": held[n] for n in held}, held.moment.values)
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


def balancer(method: str, rate: float) -> str:
    """What a balancer is called, with its step size where it has one."""
    name = "SMEBU" if method == "smebu" else method
    return name if method in RATELESS else f"{name} at {rate:g}"


def reading(run: xr.DataTree) -> str:
    """What a run shows, in sentences whose figures and verdicts come from the run."""
    if run.attrs["status"] == "rehearsed":
        return _rehearsal(run)
    parts = [_about(run), _learning(run), _balance(run), _experts(run), _heterogeneity(run)]
    notes = json.loads(run.attrs.get("warnings") or "[]")
    if run.attrs["status"] != "complete":
        parts.append(f"The run is not complete: {run.attrs['status']}.")
    return "\n\n".join([*parts, *(f"Warning: {note}" for note in notes)])


def _rehearsal(run: xr.DataTree) -> str:
    """What a rehearsal shows: nothing of learning."""
    about, verdict = run.attrs, str(run.attrs["verdict"])
    moved = group(run, "collectives")
    sent = float(moved["sent"].sum())
    return "\n\n".join(
        [
            about["reason"],
            f"{about['parameters_total']:,} parameters, "
            f"{about['parameters_active_with_embeddings'] / 1e9:.1f}B active; "
            f"{about['parameters_a_rank']:,} on rank 0 of {about['ranks']:,}.",
            str(about["summary"]),
            f"{verdict[:1].upper()}{verdict[1:]}. Routing: {about['routing']}.",
            f"A rank sends {sent / 1e9:,.0f} GB in an optimiser step.",
        ]
    )


def _about(run: xr.DataTree) -> str:
    train = group(run, "train")
    seconds = float(train["seconds"].sum())
    text = (
        f"{run.attrs['scale']}, seed {run.attrs['seed']}: {train.sizes['step']} steps, "
        f"{int(train['tokens'][-1]):,} tokens in {seconds:.0f} s; "
        f"{int(run.attrs['parameters_total']):,} parameters, "
        f"{int(run.attrs['parameters_active_with_embeddings']):,} of them active."
    )
    if "tokens_per_second" in run.attrs:
        pace = run.attrs["tokens_per_second"]
        text += f" The median step trained {pace:,.0f} tokens a second"
        if "mfu" in run.attrs:
            text += f", {run.attrs['mfu']:.1%} of what {run.attrs['gpu']} GPUs can do (MFU)"
        text += "."
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
    balance = json.loads(run.attrs["config"])["balance"]
    called = balancer(balance["method"], balance["rate"])
    return (
        f"Balance ({called}). MaxVio is {mean:.2f} over the last {late.sizes['step']} steps "
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
