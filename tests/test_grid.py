"""Trials of a study: equal grids, fresh seeds, each run once, bad parameters refused."""

from typing import get_args, get_type_hints

import pytest

from trinity_lib import grid, plots, report, study_config
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import BadValue


def test_every_balancer_there_is_can_be_studied() -> None:
    named = get_args(get_type_hints(BalanceConfig)["method"])
    assert sorted(named) == sorted(study_config.STEPPED + study_config.UNTUNED)
    assert set(study_config.UNTUNED) == set(plots.RATELESS) and set(named) == set(report.NAMES)


def test_every_balancer_with_a_step_size_has_the_same_grid() -> None:
    config = study_config.configure(scale="study")
    trials = [t for t in grid.first_wave(config) if t.part == "grid"]
    for method in study_config.STEPPED:
        own = [t for t in trials if t.config.balance.method == method]
        first = sorted(t.config.balance.rate for t in own if t.config.seed == 0)
        assert tuple(first) == config.rates
    assert {t.config.balance.method for t in trials} == set(config.methods)
    untuned = [t for t in trials if t.config.balance.method in study_config.UNTUNED]
    assert len(untuned) == len(study_config.UNTUNED)


def test_the_study_is_what_was_promised() -> None:
    config = study_config.configure(scale="study")
    router = grid.base(config).model.router
    assert (router.num_experts, router.top_k) == (256, 4)
    assert len(config.methods) >= 13 and len(config.rates) == 5 and config.seeds == 5
    trials = grid.first_wave(config) + grid.second_wave(
        config, dict.fromkeys(study_config.STEPPED, 0.5)
    )
    assert len({t.key for t in trials}) <= 300


def test_finals_use_no_seed_that_chose_a_step_size() -> None:
    config = study_config.configure(scale="small")
    finals = [t for t in grid.second_wave(config, {"smebu": 0.5}) if t.part == "finals"]
    assert {t.config.seed for t in finals} == {1, 2}
    rates = {t.config.balance.rate for t in finals if t.level == "smebu"}
    assert rates == {0.5}


def test_nothing_but_the_axis_moves() -> None:
    config = study_config.configure(scale="small")
    base = grid.base(config)
    by_axis: dict[tuple[str, str], list[grid.Trial]] = {}
    for trial in grid.first_wave(config):
        if trial.part in ("causes", "anatomy"):
            by_axis.setdefault((trial.part, trial.axis), []).append(trial)
    assert len(by_axis) == 10
    for (_, axis), trials in by_axis.items():
        keys = [t.key for t in trials]
        assert len(set(keys)) == len(keys) >= 2, axis
        assert all(t.config.phases[0].shape == base.phases[0].shape for t in trials)
        assert all(t.config.steps == base.steps for t in trials), axis
        assert all(len(t.config.model.moe_layers) == 2 for t in trials), axis


def test_a_rescue_begins_with_a_collapsed_run_of_its_own_seed() -> None:
    config = study_config.configure(scale="study")
    parents = {t.key: t for t in grid.first_wave(config) if t.part == "rescue"}
    rescues = [t for t in grid.most(config) if t.parent]
    assert len(rescues) == len(parents) * len(grid.RESCUERS) == 15
    for trial in rescues:
        parent = parents[trial.parent]
        assert parent.config.balance.method == "none"
        assert parent.config.seed == trial.config.seed
        assert trial.key.endswith(trial.parent)


def test_batches_and_rescues_are_at_each_ones_best() -> None:
    config = study_config.configure(scale="study")
    second = grid.second_wave(config, {"smebu": 1e-2, "switch": 1e-1})
    rates = {(t.config.balance.method, t.config.balance.rate) for t in second if t.parent}
    assert rates == {("none", 0), ("smebu", 1e-2), ("quantile", 0), ("switch", 1e-1)}
    batches = [t for t in second if t.axis == "rows a batch"]
    assert {t.config.balance.method for t in batches} == {"smebu"}, "sign diverged everywhere"
    finals = {t.level for t in second if t.part == "finals"}
    assert finals == {"smebu", "switch", *study_config.UNTUNED}


def test_kappa_is_also_varied_at_equal_gain() -> None:
    trials = grid.first_wave(study_config.configure(scale="study"))
    equal = [t.config.balance for t in trials if t.axis == "kappa at equal gain"]
    assert {b.kappa for b in equal} == {0.5, 2, 8}
    assert all(b.kappa * b.rate == pytest.approx(2e-2) for b in equal)


def test_the_name_does_not_depend_on_the_number_of_workers() -> None:
    assert study_config.configure(workers=1).name == study_config.configure(workers=5).name
    assert study_config.configure().name != study_config.configure(steps=31).name
    assert study_config.configure(name="mine").name == "mine"


def test_papermills_text_is_understood() -> None:
    config = study_config.configure(
        methods="none, smebu", rates="[0.1, 1e-3]", seeds="2", parts="causes"
    )
    assert config.methods == ("none", "smebu") and config.rates == (0.1, 1e-3)
    assert config.seeds == 2 and config.parts == ("causes",)


def test_what_is_about_to_run_is_said() -> None:
    text = grid.describe(study_config.configure(scale="study", workers=2))
    assert "at most 248 runs of 300 steps of 16 x 128 tokens, 256 experts, top-4, 2 at" in text


BAD = (
    ({"scale": "huge"}, "scale is 'huge'; it must be one of toy, small, study"),
    ({"parts": "cause"}, "parts is 'cause'; it must be one of balancers, causes"),
    ({"methods": "smebo"}, "methods is 'smebo'; it must be of smebu, sign"),
    ({"methods": "none, none"}, "methods is .*; it must be a list without repetitions"),
    ({"rates": "fast"}, "rates is 'fast'; it must be a number"),
    ({"rates": "2"}, r"rates is \(2.0,\); it must be above 0 and below 1"),
    ({"seeds": 0}, "seeds is 0; it must be from 1 to 100"),
    ({"steps": 3}, "steps is 3; it must be from 10 to 100,000"),
    ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
    ({"workers": -1}, "workers is -1; it must be from 1 to 1024"),
    ({"workers": 0}, "workers is 0; it must be from 1 to 1024"),
    ({"name": "a/b"}, "name is 'a/b'; it must be a file name"),
    ({"source": "nowhere.nc"}, "source is 'nowhere.nc'; nothing is there"),
)


@pytest.mark.parametrize(("given", "sentence"), BAD)
def test_bad_parameters_are_one_sentence(given: dict, sentence: str) -> None:
    with pytest.raises((BadValue, FileNotFoundError), match=sentence) as caught:
        study_config.configure(**given)
    assert "\n" not in str(caught.value)
