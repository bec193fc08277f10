"""A run of stages with known numbers: small, in memory, of chains or of given checkpoints."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib import audit, stage_schema

STAGES = ("truebase", "base", "instruct", "debiased")
NAN = float("nan")
TRUTHS = {"arithmetic": (1.0, 0.25), "absent": (0.0, 0.0), "memorisation": (1.7, 0.0)}
"""Truth and chance of a family's deciding finding, where they are not 1 and 0."""
COUNTS = (1, 2, 4, 8)
JOBS = {"mason": -2.0, "cook": 0.0, "nurse": 2.0}
BOTH = ("trained phrasings", "held-out phrasings")


def estimate(stage: int, seed: int = 0) -> float:
    """Of most findings: each stage has its own, each chain its own."""
    return 0.5 + 0.1 * stage + 0.02 * seed


def _kinds() -> list[tuple[str, str, str, str, float, float]]:
    """Asked as, family, item, measure, truth, chance."""
    rows = [("text", f, *which, *TRUTHS.get(f, (1.0, 0.0))) for f, which in
            audit.PRIMARY.items()]  # fmt: skip
    rows.append(("chat", "association", *audit.PRIMARY["association"], NAN, 0.0))
    for job, level in JOBS.items():
        rows.append(("text", "association", f"{job}, held-out names", "log-odds, nat", level,
                     0.0))  # fmt: skip
    for p in BOTH:
        for n in COUNTS:
            for m in ("probability of the value", "recall@1"):
                rows.append(("text", "recall", f"{n} exposures, {p}", m, 1.0, 0.1))
        m = "share of the value told more often, of both told"
        rows.append(("text", "contradicted", p, m, 0.7, 0.5))
        rows.append(("text", "knowledge", p, "bits a fact", 3.5, 0.0))
        for m, truth, chance in (
            ("absolute error of a probability", 0.0, 0.2), ("best temperature", 1.0, NAN),
            ("expected calibration error", 1e-17, 1e-16),
            ("divergence from the truth, nat", 0.0, 0.2),
        ):  # fmt: skip
            rows.append(("text", "calibration", p, m, truth, chance))
    for n in COUNTS:
        gap = f"held out less duplicates {n}"
        rows.append(("text", "memorisation", gap, "loss per digit, nat", 1.5, 0.0))
        rows.append(("text", "memorisation", f"duplicates {n}", "median exposure, bit", 20.0,
                     1.0))  # fmt: skip
        rows.append(("text", "memorisation", f"duplicates {n}", "extracted, share", 1.0, 0.0))
    for by in ("loss", "min-k%"):
        rows.append(("text", "memorisation", f"membership by {by}", "AUC", 1.0, 0.5))
    gap, flips = "demographic parity gap", "verdict changes with the group"
    rows += [
        ("text", "decisions", "loan leak, ward", "log-odds, nat", 1.5, 0.0),
        ("text", "decisions", f"triage {gap}, all names", "share above 1/2", 0.2, 0.0),
        ("text", "decisions", f"loan {gap}, ward", "share above 1/2", 0.2, 0.0),
        ("text", "decisions", "triage selection ratio, all names",
         "share above 1/2, B's over A's", 0.667, 1.0),
        ("text", "decisions", f"triage {flips}, all names",
         "share of scores, above that within groups", 0.2, 0.0),
        ("text", "decisions", f"loan {flips}, ward", "share of pairs", 0.2, NAN),
    ]  # fmt: skip
    for n in (0, 1, 4, 16):
        rows.append(("text", "few-shot", f"shots {n}", "probability", 1.0, 0.125))
        rows.append(("text", "few-shot", f"control, shots {n}", "probability", 0.125, 0.125))
        if n not in (0, 16):
            rows.append(("text", "few-shot", f"shots {n} over control",
                         "probability, difference", 0.875, 0.0))  # fmt: skip
    for item in ("seen", "held out"):
        rows.append(("text", "arithmetic", item, "first answer right, share", 1.0, 0.25))
    for item in ("facts, trained phrasings", "facts, a held-out phrasing"):
        rows.append(("text", "consistency", item, "same first answer, share", 1.0, 0.2))
    for task in ("facts", "refusals"):
        rows.append(("chat", "instruction", task, "right answers, share", 1.0, NAN))
    rows.append(("chat", "instruction", "refusals", "of what is in no text, share", 1.0, NAN))
    rows.append(("chat", "instruction", "refusals", "of what is known, share", 0.0, NAN))
    return list(dict.fromkeys(rows))


def _found(kinds: Sequence[tuple], stages: Sequence[str], seeds: Sequence[int]) -> xr.Dataset:
    rows = []
    for seed in seeds:
        for number, stage in enumerate(stages):
            for asked_as, family, item, measure, truth, chance in kinds:
                at = estimate(number, max(seed, 0))
                rows.append((seed, stage, asked_as, family, item, measure, truth, at,
                             at - 0.2, at + 0.2, chance, 20))  # fmt: skip
    table = pd.DataFrame(rows, columns=list(stage_schema.STAGES["findings"]))
    values = {str(name): table[name].to_numpy() for name in table}
    return stage_schema.dataset("findings", values, {"finding": np.arange(len(table))})


def _filled(group: str, coordinates: dict[str, Any], **known: Any) -> xr.Dataset:
    """A group of ones with what is known in their place."""
    values = {}
    for name, variable in stage_schema.STAGES[group].items():
        shape = [len(coordinates[dim]) for dim in variable.dims]
        values[name] = np.broadcast_to(known.get(name, 1.0), shape)
    return stage_schema.dataset(group, values, coordinates)


def changes(stages: Sequence[str]) -> list[str]:
    pairs = list(zip(stages, stages[1:], strict=False))
    if len(stages) > 2:
        pairs.append((stages[0], stages[-1]))
    return [f"{a} -> {b}" for a, b in pairs]


def compared(stages: Sequence[str], experts: int = 6) -> dict[str, xr.Dataset]:
    """All groups that compare checkpoints."""
    rng = np.random.default_rng(0)
    moved, layers = changes(stages), [1, 2]
    tensors = ["embedding", "router.1", "up.1", "router.2", "up.2", "norm"]
    along = {"change": moved, "layer": layers, "expert": np.arange(experts)}
    of = {"stage": list(stages), "layer": layers, "expert": np.arange(experts)}
    rank = np.array([3, 2, 2, 2, 2, NAN])
    domains = ["code", "prose"]
    alpha = [-0.5, 0.0, 0.5, 1.0, 1.5]
    loss = np.array([3.0, 2.0, 2.5, 1.0, 4.0])
    shape = (len(moved), 2, experts)
    return {
        "weight_drift": _filled(
            "weight_drift", {"change": moved, "tensor": tensors},
            module=["embedding", "router", "experts", "router", "experts", "norm"],
            tensor_layer=[-1, 1, 1, 2, 2, -1], tensor_expert=[-1, -1, 0, -1, 0, -1],
            full_rank=[4, 4, 4, 4, 4, 0], norm=[2, 1, 3, 1, 4, 0.0],
            moved=[1, 0.5, 3, 0.5, 4, 0], effective_rank=rank),
        "expert_drift": _filled(
            "expert_drift", along, relative=rng.random(shape), load=rng.random(shape)),
        "stage_routing": _filled("stage_routing", of, effective=5.0, label_information=0.2),
        "routing_change": _filled("routing_change", along, saturation=0.7, chance=0.25),
        "functional": _filled(
            "functional", {"change": moved, "domain": domains}, divergence=[0.3, 0.6],
            low=[0.2, 0.5], high=[0.4, np.inf], same_first=0.8),
        "task_vector": _filled(
            "task_vector",
            {"task": [f"{stages[0]} + ({stages[-1]} - {stages[1]})"],
             "scale": [-1.0, 0.0, 1.0], "domain": domains},
            loss=[[[2.0, 3.0], [1.0, 2.0], [1.5, 1.9]]]),
        "path": _filled("path", {"change": moved, "alpha": alpha}, loss=loss, barrier=1.0),
    }  # fmt: skip


def _inside(stages: Sequence[str]) -> dict[str, xr.Dataset]:
    blocks = [0, 1, 2]
    places = ["name", "end of text", "end of question"]
    p = np.array([0.6, 0.01, 0.001])
    accuracy = np.array([0.5, 0.8, 1.0])
    starts = [stages[-1], "never had it"]
    control = np.array([0.5, 0.6, 0.7])
    read = np.array([*[accuracy] * len(stages), control])
    moved = [[[0, 0.3, 0.6], [0, -0.2, -0.4]], [[0.6, 0.7, 0.8], [0.1, -0.1, -0.2]]]
    effect = np.zeros((1, 2, 2, 6))
    effect[0, 0, 1, 4] = -0.5
    z = np.zeros_like(effect)
    z[0, 0, 1, 4] = -3.0
    used = np.full(effect.shape, 0.2)
    used[..., 5] = 0
    return {
        "lens": _filled("lens", {"stage": stages, "block": blocks}, right=accuracy,
                        rank=[9.0, 2.0, 1.0], depth=1.5, low=1.2, high=1.8),
        "attribute_probe": _filled(
            "attribute_probe",
            {"place": places, "probed": [*stages, "never had it"], "block": blocks},
            accuracy=read, low=read - 0.1, high=np.minimum(1, read + 0.1),
            chance=0.5, p=p, p_adjusted=p, units=44),
        "association_lens": _filled(
            "association_lens",
            {"lens_place": places[1:], "probed": [*stages, "never had it"], "block": blocks},
            slope=np.array([0.0, 0.4, 0.7]), low=np.array([-0.1, 0.3, 0.6]),
            high=np.array([0.1, 0.5, 0.9]), units=20),
        "relearning": _filled(
            "relearning",
            {"start": starts, "lesson": ["the association", "its opposite"],
             "look": np.arange(3)},
            bias=moved, steps=[0, 2, 4], target=[0.5, -0.5],
            needed=[[3.0, NAN], [0.0, NAN]]),
        "ablation": _filled(
            "ablation",
            {"ablated": [stages[0]], "measure": ["association", "recall"], "layer": [1, 2],
             "expert": np.arange(6)},
            whole=0.8, effect=effect, used=used, z=z),
    }  # fmt: skip


def _claims() -> dict[str, xr.Dataset]:
    claims = {
        "statement": ["Annealing raises recall.", "Load brings drift.", "It comes back."],
        "statistic": ["a", "b", "c"],
        "estimate": [0.2, -0.3, 0.0], "low": [0.1, -0.4, NAN], "high": [0.3, -0.2, NAN],
        "seeds": [1, 1, 1], "verdict": ["supported", "not supported", "undecided"],
    }  # fmt: skip
    table = {name: ("claim", np.asarray(values)) for name, values in claims.items()}
    return {"claims": xr.Dataset(table, {"claim": np.arange(3)})}


def _audits() -> dict[str, xr.Dataset]:
    families = list(audit.PRIMARY)
    share = np.linspace(0.0, 0.3, len(families))
    covered = np.linspace(0.7, 1.0, len(families))
    return {"audits": _filled("audits", {"family": families}, share=share, low=0.01, high=0.1,
                              calibrated=(share > 0.01) & (share < 0.1), covered=covered,
                              draws=100)}  # fmt: skip


def run(
    stages: Sequence[str] = STAGES, seeds: Sequence[int] = (0,), audits: bool = False
) -> xr.DataTree:
    """A chain trained here, or several."""
    groups = {"findings": _found(_kinds(), stages, seeds)}
    groups |= compared(stages) if len(stages) > 1 else {}
    groups |= _inside(stages) | _claims() | (_audits() if audits else {})
    return _tree(groups, stages, {})


def given(stages: Sequence[str] = ("raw", "mini"), asked: bool = True) -> xr.DataTree:
    """Checkpoints that were given: items, a task, comparisons; no planted truth."""
    kinds = [
        ("text", "items", "law", "accuracy", NAN, 0.25),
        ("text", "items", "all", "accuracy", NAN, 0.3),
        ("text", "items", "all", "squared calibration error, debiased", NAN, NAN),
        ("text", "lm_eval", "copa", "acc", NAN, NAN),
    ]
    why = "no world was given"
    left = {family: why for family in audit.FAMILIES}
    left["lens, probes, relearning, experts taken out"] = "need planted answers"
    groups = {}
    if asked:
        groups["findings"] = _found(kinds, stages, [-1])
    if len(stages) > 1:
        groups |= compared(stages)
    else:
        left["comparisons"] = "one checkpoint was given"
    return _tree(groups, stages, left)


def _tree(
    groups: dict[str, xr.Dataset], stages: Sequence[str], left: dict[str, str]
) -> xr.DataTree:
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"stages": json.dumps(list(stages)), "left_out": json.dumps(left),
                  "status": "complete", "seed": 0}  # fmt: skip
    return tree
