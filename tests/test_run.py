"""What decides a run: ranges, JSON round trips, its schedule and its names."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import optim, recipes
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import BadValue, digest, from_json, override, to_json
from trinity_lib.data import DataConfig
from trinity_lib.optim import OptimConfig, Phase
from trinity_lib.run import RunConfig, named, schedule, stage_name
from trinity_lib.sources import Source

SHARES = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 9), min_size=1, max_size=4)
SOURCES = st.lists(st.sampled_from("abcd"), unique=True, max_size=4).map(
    lambda names: tuple(Source(name=n, path=f"/x/{n}.txt", field="body") for n in names)
)
PHASES = st.builds(
    Phase,
    tokens=st.integers(1, 10**6),
    batch=st.sampled_from([4, 8, 16]),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    end=st.floats(0, 1),
    warmup=st.integers(0, 50),
    mixture=SHARES,
)
RUNS = st.builds(
    RunConfig,
    scale=st.sampled_from(["toy", "small"]),
    name=st.text("ab-1é", max_size=9),
    seed=st.integers(0, 2**63 - 1),
    model=st.sampled_from([recipe().model for recipe in recipes.SCALES.values()]),
    data=st.builds(
        DataConfig,
        sources=SOURCES,
        tokenizer=st.text(max_size=9),
        sequence_length=st.integers(2, 4096),
        rsdb=st.integers(0, 10**7),
        validation_share=st.integers(2, 99),
    ),
    balance=st.builds(
        BalanceConfig,
        method=st.sampled_from(["none", "sign", "smebu"]),
        rate=st.floats(0, 1),
        beta=st.floats(0, 0.99),
        kappa=st.floats(0.01, 9),
    ),
    optim=st.builds(OptimConfig, muon_rate=st.floats(1e-6, 1), clip=st.floats(0.1, 9)),
    phases=st.lists(PHASES, min_size=1, max_size=4).map(tuple),
    init=st.text(max_size=9),
    micro_batches=st.sampled_from([1, 2, 4]),
    keep=st.integers(1, 9),
    record_choices=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(RUNS)
def test_a_whole_configuration_round_trips(config: RunConfig) -> None:
    again = from_json(RunConfig, to_json(config))
    assert again == config and digest(again) == digest(config)
    assert all(type(source) is Source for source in again.data.sources)


@settings(deadline=None, max_examples=60)
@given(RUNS)
def test_a_schedule_is_its_phases_one_after_another(config: RunConfig) -> None:
    if sum(config.steps) > 20_000:
        config = recipes.with_steps(config, 500)
    plan = schedule(config)
    assert len(plan) == sum(config.steps)
    assert [s.phase for s in plan] == sorted(s.phase for s in plan)
    assert sum(s.ends_phase for s in plan) == sum(s.number == 0 for s in plan)
    assert sum(s.number == 0 for s in plan) == len(config.phases)
    assert all(0 <= s.share <= 1 for s in plan)
    length = config.data.sequence_length
    for i, phase in enumerate(config.phases):
        tokens = sum(s.rows * length for s in plan if s.phase == i)
        assert phase.tokens <= tokens < phase.tokens + phase.batch * length


def test_larges_schedule_is_every_step_of_it() -> None:
    plan = schedule(recipes.large())
    assert len(plan) == sum(recipes.large().steps) and plan[0].rows == 12_288
    assert plan[-1].rows == 16_384 and plan[-1].share == pytest.approx(0.1, abs=1e-3)
    assert plan[2000].share == 1.0 and optim.rate(recipes.large().phases, 0, 0, 1) < 1e-3


@pytest.mark.parametrize(
    ("phases", "names"),
    [
        (1, ["base"]),
        (2, ["truebase", "base"]),
        (4, ["truebase", "phase-2", "phase-3", "base"]),
    ],
)
def test_every_phase_end_has_a_name(tiny: RunConfig, phases: int, names: list) -> None:
    config = dataclasses.replace(tiny, phases=(tiny.phases * 2)[:phases])
    assert [stage_name(config, i) for i in range(phases)] == names


def test_a_run_is_named_once(tiny: RunConfig) -> None:
    first, second = named(tiny), named(dataclasses.replace(tiny, seed=1))
    assert first.name.startswith(f"tiny-{digest(tiny)}-") and named(first) is first
    assert first.name.split("-")[1] != second.name.split("-")[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": ".x"}, "name is '.x'; it must be a file name without"),
        ({"name": "a\nb"}, "name is 'a\\\\nb'; it must be a file name"),
        ({"name": "x.nc"}, "name is 'x.nc'; it must be a name without .nc"),
        ({"name": "é" * 101}, "it must be at most 200 bytes"),
        ({"seed": 2**63}, "it must be below 2\\*\\*63"),
        ({"threads": 4096}, "threads is 4096; it must be at most 1024"),
        (
            {"record_choices": True, "model.router.num_experts": 40_000},
            "record_choices is True; it must be false above 32,767 experts",
        ),
        ({"keep": 0}, "keep is 0; it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1"),
        ({"phases": ()}, "phases is \\(\\); it must be at least one phase"),
        ({"z_loss": "inf"}, "z_loss is inf; it must be a finite number"),
        ({"spike": float("nan")}, "spike is nan; it must be a finite number"),
    ],
)
def test_settings_out_of_range_are_one_sentence(
    tiny: RunConfig, changes: dict, sentence: str
) -> None:
    with pytest.raises(BadValue, match=sentence):
        override(tiny, changes)
