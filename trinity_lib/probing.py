"""Is a planted attribute linearly decodable from hidden states, whatever the model says?

A linear probe is trained after every block and asked about names it was not trained on
(Alain and Bengio, arXiv 1610.01644). That an attribute can be read does not say that the
model uses it: `ablation` and `relearning` do.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from trinity_lib import hidden, intervals, stage_schema
from trinity_lib.config import require
from trinity_lib.model import Trinity
from trinity_lib.tokenizer import Vocabulary

PENALTY = 0.1
"""Ridge, as a share of the features' total variance: fixed, never chosen by its result."""
PERMUTATIONS = 999
TIE = 1e-9
"""A score this near 0 is no decision; labels are 1 and -1."""
ROUNDING = 1e-9
"""A feature that varies by less, as a share of its largest value, does not vary."""


class Probe(NamedTuple):
    """What probes of every block find; an array is [block] unless it says otherwise."""

    accuracy: np.ndarray
    """Share of names whose group is decoded by a probe that never saw them; ties are half."""
    low: np.ndarray
    """Lower end of its exact 95% interval over names; see `probe`."""
    high: np.ndarray
    """Upper end."""
    chance: np.ndarray
    """Mean accuracy of permuted labels."""
    p: np.ndarray
    """Share of permutations that do as well in this block."""
    p_adjusted: np.ndarray
    """Share of permutations that do as well in any block: what looking at all of them costs."""
    seen: np.ndarray
    """Accuracy for names that were trained on, in prompts that were not; NaN: one prompt."""
    control: np.ndarray
    """The same of permuted labels: what the probe can learn by heart."""
    hit: np.ndarray
    """Whether each name is decoded, [block, name]; 0.5 for a tie."""

    @property
    def selectivity(self) -> np.ndarray:
        """Accuracy beyond the control task's (Hewitt and Liang, arXiv 1909.03368)."""
        return self.seen - self.control


def at_names(
    model: Trinity, vocabulary: Vocabulary, names: Sequence[str], prompts: Sequence[str]
) -> np.ndarray:
    """States at the last token of each name, [block, name, prompt, D].

    `prompts` have the slot `{name}`. What stands behind it is not seen there.
    """
    texts, begun = _filled(names, prompts)
    return _arranged(model, hidden.ending(vocabulary, texts, begun), len(names))


def at_ends(
    model: Trinity, vocabulary: Vocabulary, names: Sequence[str], prompts: Sequence[str]
) -> np.ndarray:
    """States at the last token of each prompt about a name, [block, name, prompt, D].

    There the answer is decided; block 0 knows nothing of a name before it.
    """
    texts, _ = _filled(names, prompts)
    return _arranged(model, hidden.last(vocabulary, texts), len(names))


def _filled(names: Sequence[str], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every name in every prompt, and the same up to the name's end."""
    for prompt in prompts:
        require("{name}" in prompt, "prompt", prompt, "text with the slot {name}")
    texts = [prompt.replace("{name}", name) for name in names for prompt in prompts]
    begun = [prompt.partition("{name}")[0] + name for name in names for prompt in prompts]
    return texts, begun


def _arranged(model: Trinity, places: Sequence[hidden.Place], names: int) -> np.ndarray:
    found = hidden.read(model, places).double().numpy()
    return found.reshape(len(found), names, -1, found.shape[-1])


def probe(
    states_LNPD: np.ndarray,
    positive: Sequence[bool],
    strata: Sequence[object] | None = None,
    *,
    penalty: float = PENALTY,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Probe:
    """Ridge regression on labels 1 and -1 after every block, and its null.

    `states_LNPD` are [block, name, prompt, D]; `positive` says which of two groups a name is
    of. Names are paired at random, one of each group and both of one of `strata` (told and
    never told, say), and every pair is left out in turn: so groups are balanced in every
    training set, where leaving out one name would favour the other group. Labels are
    permuted within pairs, alike in all blocks, and training is repeated each time. The
    interval takes names as independent, though they share training sets (Bengio and
    Grandvalet 2004): near chance it covers in 9 of 10 null cases, so test with `p`.
    BadValue where a stratum has not as many names of each group.
    """
    blocks, names, prompts, _ = states_LNPD.shape
    require(penalty > 0, "penalty", penalty, "above zero")
    require(permutations >= 1, "permutations", permutations, "at least 1")
    require(np.isfinite(states_LNPD).all(), "states", "not finite", "finite numbers")
    rng = np.random.default_rng(seed)
    pair_N = _pairs(np.asarray(positive, dtype=bool), strata, names, rng)
    label_N = np.where(positive, 1.0, -1.0)
    flips = rng.integers(2, size=(pair_N.max() + 1, permutations)) * 2 - 1
    labels = np.column_stack([label_N, label_N[:, None] * flips[pair_N]])  # the first: true
    held, seen = np.empty((2, blocks, names, 1 + permutations))
    for block, states_NPD in enumerate(states_LNPD):
        hat = _hat(states_NPD, penalty)
        held[block] = _hits(hat, np.repeat(pair_N, prompts), labels)
        seen[block] = np.nan
        if prompts > 1:
            seen[block] = _hits(hat, np.tile(np.arange(prompts), names), labels)
    return _found(held, seen)


def _pairs(
    positive: np.ndarray,
    strata: Sequence[object] | None,
    names: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Number of each name's pair."""
    kinds = [None] * names if strata is None else list(strata)
    fits = len(positive) == len(kinds) == names >= 4
    right = f"{names} groups and strata, one a name, and four names or more"
    require(fits, "positive", (len(positive), len(kinds)), right)
    pair_N, count = np.empty(names, dtype=np.int64), 0
    for kind in dict.fromkeys(kinds):
        mine = np.array([each == kind for each in kinds])
        first, second = np.flatnonzero(mine & positive), np.flatnonzero(mine & ~positive)
        sizes = (len(first), len(second))
        right = "as many of each group"
        require(sizes[0] == sizes[1], f"names of stratum {kind}", sizes, right)
        pair_N[rng.permutation(first)] = pair_N[second] = count + np.arange(len(first))
        count += len(first)
    return pair_N


def _hat(states_NPD: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge's hat matrix [R, R] of R = N * P standardised rows, with a free intercept.

    What a prompt does to all names alike is taken off. Labels play no part in that, so it
    may see all rows.
    """
    largest_D = np.abs(states_NPD).max((0, 1))
    centred_RD = (states_NPD - states_NPD.mean(0)).reshape(-1, states_NPD.shape[-1])
    scale_D = centred_RD.std(0)
    varies = scale_D > ROUNDING * largest_D
    standard_RD = centred_RD[:, varies] / scale_D[varies]
    rows = len(centred_RD)
    kernel_RR = standard_RD @ standard_RD.T
    ridge = penalty * max(1, varies.sum())  # trace of the kernel over rows
    return np.linalg.solve(kernel_RR + ridge * np.eye(rows), kernel_RR) + 1 / rows


def _hits(hat_RR: np.ndarray, fold_R: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each name is decoded under each labelling, [name, labelling].

    Rows are name by name. What a fold's rows would be given, had they not been trained on,
    follows from the whole fit: y_F - (I - H_FF)^-1 (y - Hy)_F. A name's rows count together.
    """
    prompts = len(hat_RR) // len(labels)
    given = np.repeat(labels, prompts, axis=0)
    residual = given - hat_RR @ given
    scores = np.empty_like(given)
    for fold in np.unique(fold_R):
        here = np.flatnonzero(fold_R == fold)
        left = np.eye(len(here)) - hat_RR[np.ix_(here, here)]
        scores[here] = given[here] - np.linalg.solve(left, residual[here])
    margin = scores.reshape(len(labels), prompts, -1).mean(1) * labels
    return np.where(np.abs(margin) <= TIE, 0.5, margin > 0)


def _found(held: np.ndarray, seen: np.ndarray) -> Probe:
    """From hits [block, name, labelling], the first labelling being the true one."""
    accuracy = held.mean(1)
    true, null = accuracy[:, 0], accuracy[:, 1:]
    names = held.shape[1]
    hits = held[:, :, 0].sum(1)  # rounded down where a tie leaves a half
    ranges = [intervals.proportion(int(each), names) for each in hits]
    as_well = null >= true[:, None] - TIE
    any_block = null.max(0) >= true[:, None] - TIE
    draws = null.shape[1] + 1
    return Probe(
        accuracy=true,
        low=np.array([each.low for each in ranges]),
        high=np.array([each.high for each in ranges]),
        chance=null.mean(1),
        p=(1 + as_well.sum(1)) / draws,
        p_adjusted=(1 + any_block.sum(1)) / draws,
        seen=seen[:, :, 0].mean(1),
        control=seen[:, :, 1:].mean((1, 2)),
        hit=held[:, :, 0],
    )


def dataset(places: Mapping[str, Mapping[str, Probe]]) -> xr.Dataset:
    """The group `attribute_probe`: stages side by side, place by place."""
    kinds = {tuple(stages) for stages in places.values()}
    require(len(kinds) == 1 and kinds != {()}, "stages", sorted(kinds), "alike in all places")
    every = [list(stages.values()) for stages in places.values()]
    shapes = {found.hit.shape for row in every for found in row}
    require(len(shapes) == 1, "stages", list(kinds), "of as many blocks and names")
    blocks, names = shapes.pop()
    fields = [name for name in Probe._fields if name != "hit"] + ["selectivity"]
    values = {name: np.array([[getattr(s, name) for s in row] for row in every])
              for name in fields}  # fmt: skip
    values["units"] = np.full((len(places), len(every[0]), blocks), names)
    at = {"place": list(places), "probed": list(kinds.pop()), "block": np.arange(blocks)}
    return stage_schema.dataset("attribute_probe", values, at)
