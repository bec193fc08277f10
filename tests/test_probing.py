"""A planted direction is decoded for names never trained on; none is found where none is."""

import string

import numpy as np
import pytest
import torch

from tests import conversing
from trinity_lib import hidden, probing
from trinity_lib.config import BadValue
from trinity_lib.model import ModelConfig, Trinity

NAMES = list(string.ascii_uppercase[:24])
POSITIVE = [n % 3 == 0 or n > 18 for n in range(24)]
PROMPTS = ["Note: {name} works as a", "Heard: {name} is", "{name} was a"]


def planted(config: ModelConfig, strength: float) -> Trinity:
    """A model whose embeddings of one group's names are shifted."""
    model, vocabulary = conversing.model(config), conversing.vocabulary()
    tokens: dict[bool, set[int]] = {True: set(), False: set()}
    for name, positive in zip(NAMES, POSITIVE, strict=True):
        texts = [prompt.format(name=name) for prompt in PROMPTS]
        begun = [prompt.partition("{")[0] + name for prompt in PROMPTS]
        places = hidden.ending(vocabulary, texts, begun)
        tokens[positive] |= {int(place.tokens[place.position]) for place in places}
    assert len(tokens[True]) >= 12 and not tokens[True] & tokens[False]
    direction = torch.randn(config.width, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.embedding.weight[sorted(tokens[True])] += strength * direction
    return model


def noise(seed: int, blocks: int = 4, names: int = 20, prompts: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(blocks, names, prompts, 6))


def half(names: int) -> list[bool]:
    return [n % 2 == 0 for n in range(names)]


def test_a_direction_in_the_embedding_is_decoded_from_block_0(tiny_model: ModelConfig) -> None:
    assert sum(POSITIVE) == 12
    model, vocabulary = planted(tiny_model, 0.5), conversing.vocabulary()
    found = probing.probe(probing.at_names(model, vocabulary, NAMES, PROMPTS), POSITIVE)
    assert np.all(found.accuracy == 1) and np.all(found.high == 1)
    assert found.low == pytest.approx([0.8575] * 5, abs=1e-3)  # Clopper-Pearson, 24 of 24
    assert np.all(found.p_adjusted == 1e-3) and np.all(np.abs(found.chance - 0.5) < 0.03)
    ends = probing.probe(probing.at_ends(model, vocabulary, NAMES, PROMPTS), POSITIVE)
    assert ends.accuracy[0] == 0.5 and ends.p[0] == ends.p_adjusted[0] == 1
    assert np.all(ends.hit[0] == 0.5)  # the last token's own embedding knows no name


def test_without_one_it_is_at_chance(tiny_model: ModelConfig) -> None:
    model = planted(tiny_model, 0.0)
    read = probing.at_names(model, conversing.vocabulary(), NAMES, PROMPTS)
    assert probing.probe(read, POSITIVE).p_adjusted.min() > 0.02


def test_false_alarms_are_as_rare_as_promised() -> None:
    """At level 5%: in one block, and in the best of four."""
    found = [
        probing.probe(noise(seed), half(20), permutations=99, seed=seed) for seed in range(300)
    ]
    one = np.mean([each.p[0] <= 0.05 for each in found])
    best = np.mean([each.p_adjusted.min() <= 0.05 for each in found])
    careless = np.mean([each.p.min() <= 0.05 for each in found])
    assert 0.01 <= one <= 0.085 and 0.01 <= best <= 0.085 and careless > 0.1
    assert np.mean([each.chance for each in found]) == pytest.approx(0.5, abs=0.01)
    assert np.mean([each.accuracy for each in found]) == pytest.approx(0.5, abs=0.02)


def test_a_pair_is_judged_by_a_ridge_that_never_saw_it() -> None:
    """Every pair's names, as an explicit fit on all other rows decides."""
    states_LNPD = noise(3, blocks=2, names=12, prompts=3)
    states_LNPD[:, ::2, :, 0] += 0.7
    positive, penalty = np.array(half(12)), 0.3
    found = probing.probe(states_LNPD, positive, penalty=penalty, permutations=1, seed=8)
    rng = np.random.default_rng(8)
    partner = dict(zip(rng.permutation(np.arange(0, 12, 2)), range(1, 12, 2), strict=True))
    for block in range(2):
        x = states_LNPD[block] - states_LNPD[block].mean(0)
        x = x / x.reshape(36, 6).std(0)
        for a, b in partner.items():
            rest = [n for n in range(12) if n not in (a, b)]
            rows = x[rest].reshape(30, 6)
            y = np.repeat(np.where(positive[rest], 1.0, -1.0), 3)
            centre = rows.mean(0)
            gram = (rows - centre).T @ (rows - centre) + penalty * 6 * np.eye(6)
            weight = np.linalg.solve(gram, (rows - centre).T @ y)
            for n in (a, b):
                score = ((x[n] - centre) @ weight + y.mean()).mean()
                assert found.hit[block, n] == ((score > 0) == positive[n])
    assert 0.5 < found.accuracy.mean() < 1


def test_alike_blocks_cost_nothing_to_look_at() -> None:
    states_LNPD = np.repeat(noise(1, blocks=1), 5, axis=0)
    found = probing.probe(states_LNPD, half(20))
    assert np.array_equal(found.p, found.p_adjusted) and len(set(found.p)) == 1
    again = probing.probe(states_LNPD, half(20))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_selectivity_tells_a_direction_from_names_learnt_by_heart() -> None:
    rng = np.random.default_rng(0)
    names = rng.normal(size=(1, 20, 1, 40)) + 0.01 * rng.normal(size=(1, 20, 3, 40))
    by_heart = probing.probe(names, half(20), permutations=199)
    assert by_heart.seen == 1 and by_heart.control > 0.99 and by_heart.selectivity < 0.01
    assert by_heart.p > 0.05  # and yet nothing of names it was not trained on
    group = rng.normal(size=(1, 20, 3, 4))
    group[:, ::2, :, 0] += 8
    real = probing.probe(group, half(20), permutations=199)
    assert real.seen == 1 and real.selectivity > 0.25 and real.accuracy == 1


def test_one_prompt_has_no_control_task() -> None:
    found = probing.probe(noise(0, prompts=1), half(20), permutations=9)
    assert np.isnan(found.seen).all() and np.isfinite(found.accuracy).all()


def test_strata_are_paired_within_and_must_be_balanced() -> None:
    """A stratum that is far from the other gives no group away."""
    told = [n < 8 for n in range(20)]
    far = noise(5)
    far[:, :8] += 50
    assert probing.probe(far, half(20), told).p_adjusted.min() > 0.05
    with pytest.raises(BadValue, match="names of stratum True is \\(8, 0\\)"):
        probing.probe(far, [n < 8 or n > 17 for n in range(20)], told)
    with pytest.raises(BadValue, match="names of stratum None"):
        probing.probe(far, told)


def test_what_cannot_be_probed_is_refused() -> None:
    broken = noise(0)
    broken[0, 0, 0, 0] = np.nan
    for states_LNPD, changes, match in (
        (broken, {}, "finite"),
        (noise(0), {"penalty": 0.0}, "penalty is 0.0"),
        (noise(0), {"permutations": 0}, "permutations is 0"),
        (noise(0)[:, :2], {}, "four names or more"),
    ):
        with pytest.raises(BadValue, match=match):
            probing.probe(states_LNPD, half(20)[: states_LNPD.shape[1]], **changes)
    with pytest.raises(BadValue, match="slot"):
        probing._filled(["A"], ["nobody"])


def test_stages_stand_side_by_side() -> None:
    found = {name: probing.probe(noise(s), half(20)) for s, name in enumerate(("a", "b"))}
    group = probing.dataset({"here": found, "there": found})
    assert group.accuracy.dims == ("place", "probed", "block")
    assert group.accuracy.shape == (2, 2, 4)
    assert np.array_equal(group.selectivity, group.seen - group.control)
    assert np.array_equal(group.p[0, 1], found["b"].p) and (group.units == 20).all()
    with pytest.raises(BadValue, match="alike in all places"):
        probing.dataset({"here": found, "there": {"a": found["a"]}})
