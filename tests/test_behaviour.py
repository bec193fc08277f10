"""What is planted in pairs and sums is found, and what was taken away is not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from trinity_lib import behaviour, planted
from trinity_lib.behaviour import PRIMARY, instructed, refusals
from trinity_lib.config import BadValue
from trinity_lib.oracle import OPERATIONS, Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.subject import Finding

SMALL = WorldConfig(names=2, held_out_names=2, jobs=1, people=9, places=7, codes=2)
Answer = Callable[[str, Sequence[str]], np.ndarray | None]


class Doctored(Oracle):
    """An oracle that answers some questions as it is told to: log-probabilities, or None."""

    def __init__(self, world: World, answer: Answer) -> None:
        super().__init__(world)
        self.answer = answer

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        known = super().score(prompts, answers)
        told = [self.answer(*each) for each in zip(prompts, answers, strict=True)]
        return [b if a is None else a for a, b in zip(told, known, strict=True)]


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


def named(findings: Sequence[Finding]) -> dict[tuple[str, str], Finding]:
    found = {(f.item, f.measure): f for f in findings}
    assert len(found) == len(findings)
    return found


def result(prompt: str) -> int | None:
    """What a sum comes to."""
    words = prompt.removesuffix(" =").split()
    if len(words) != 3 or words[1] not in OPERATIONS:
        return None
    return OPERATIONS[words[1]](int(words[0]), int(words[2]))


def adds_up(by: int = 0, right: float = 1.0) -> Answer:
    """Says `by` more than each result with a probability, and the others alike."""

    def answer(prompt: str, answers: Sequence[str]) -> np.ndarray | None:
        whole = result(prompt)
        if whole is None:
            return None
        here = [int(each) == whole + by for each in answers]
        return np.log([right if h else (1 - right) / 3 + 1e-9 for h in here]) - 2.0

    return answer


@pytest.mark.parametrize("config", [WorldConfig(), SMALL])
@pytest.mark.parametrize("kind", [True, False])
def test_the_generator_recovers_every_truth(config: WorldConfig, kind: bool) -> None:
    world = planted.world(replace(config, planted=kind))
    findings = behaviour.audit(Oracle(world), world)
    keys = [(f.family, f.item, f.measure) for f in findings]
    assert len(set(keys)) == len(keys)
    for family, which in PRIMARY.items():
        assert findings[keys.index((family, *which))].at_chance != kind
    for finding in findings:
        assert finding.recovered or math.isnan(finding.truth), finding
        assert kind or finding.family == "consistency" or finding.at_chance, finding
    decided = behaviour.primary(Oracle(world), world)
    assert all(finding in findings for finding in decided)


def test_pairs_that_were_shown_are_told_from_random_ones(full: World) -> None:
    found = named(behaviour.few_shot(Oracle(full), full))
    for shots in (1, 2, 4, 8, 16):
        assert found[f"shots {shots}", "first answer right, share"].estimate == 1
        assert found[f"control, shots {shots}", "probability"].estimate == pytest.approx(1 / 8)
        advantage = found[f"shots {shots} over control", "probability, difference"]
        assert advantage.estimate == pytest.approx(7 / 8)
        sides = [found[f"{c}shots {shots}", "probability"].units for c in ("", "control, ")]
        assert advantage.units == sum(sides)
        seen = sum(about == (shots, False, True) for about in planted.about(full, "patterns"))
        assert sides[0] == seen
    assert found["shots 0", "probability"].estimate == pytest.approx(1 / 8)
    assert found["shots 0", "probability"].units <= 12  # keys, of which documents are copies
    assert found["shots 16", "probability"].units == 32


def test_without_the_ability_there_is_no_advantage(full: World) -> None:
    def answer(prompt: str, answers: Sequence[str]) -> np.ndarray | None:
        return np.zeros(8) if prompt.startswith("Pairs:") else None

    found = named(behaviour.few_shot(Doctored(full, answer), full))
    for (item, measure), finding in found.items():
        assert finding.at_chance, item
        assert finding.estimate == pytest.approx(0 if "over" in item else 1 / 8), measure
        assert not finding.recovered or finding.truth == pytest.approx(finding.chance)


def test_copying_the_last_label_is_a_part_of_right_where_labels_are_random(full: World) -> None:
    def answer(prompt: str, answers: Sequence[str]) -> np.ndarray | None:
        words = prompt.split()
        if words[0] != "Pairs:" or words[-1] not in words[1:-1]:
            return None
        last = len(words) - 2 - words[-2::-1].index(words[-1])
        return np.where([each == f" {words[last + 1]}" for each in answers], 0.0, -30.0)

    found = named(behaviour.few_shot(Doctored(full, answer), full))
    assert found["shots 16", "probability"].estimate == pytest.approx(1)
    control = found["control, shots 16", "probability"].estimate
    shares = []
    for question, about in zip(
        planted.questions(full, "patterns"), planted.about(full, "patterns"), strict=True
    ):
        words = question.prompt.split()
        labels = [b for a, b in zip(words[1::2], words[2::2], strict=False) if a == words[-1]]
        if about == (16, True, True):
            shares.append(labels.count(labels[-1]) / len(labels))
    assert control == pytest.approx(np.mean(shares)) and 0.2 < control < 0.6


def test_sums_that_are_right_with_a_probability_show_it(full: World) -> None:
    found = named(behaviour.arithmetic(Doctored(full, adds_up(right=0.7)), full))
    problems = [
        (frozenset(about.problem.split()), about.held_out)
        for about in planted.about(full, "arithmetic")
        if isinstance(about, planted.Sum)
    ]
    splits = {
        item: len({p for p, held_out in problems if held_out in which})
        for item, which in (("all", (0, 1)), ("seen", (0,)), ("held out", (1,)))
    }
    for item, units in splits.items():
        figure = found[item, "probability"]
        assert figure.estimate == pytest.approx(0.7) and figure.units == units
        assert found[item, "first answer right, share"].estimate == 1
    for split in ("seen", "held out"):
        assert sum(found[f"{split}, {s}", "probability"].units for s in "+-x") == splits[split]


def test_wrong_sums_are_counted_by_operation_and_have_the_exact_interval(full: World) -> None:
    def answer(prompt: str, answers: Sequence[str]) -> np.ndarray | None:
        return adds_up(right=0.1)(prompt, answers) if " x " in prompt else None

    found = named(behaviour.arithmetic(Doctored(full, answer), full))
    products = found["seen, x", "first answer right, share"]
    assert products.estimate == 0 and products.chance == 0.25
    assert products.high == pytest.approx(1 - 0.025 ** (1 / products.units), abs=1e-6)
    assert found["held out, -", "first answer right, share"].estimate == 1
    seen = found["seen", "first answer right, share"]
    assert seen.estimate == pytest.approx(1 - products.units / seen.units)


def test_who_can_add_agrees_both_ways_and_who_cannot_take_away_does_not(
    full: World,
) -> None:
    exact = named(behaviour.two_ways(Doctored(full, adds_up()), full))
    assert [f.estimate for f in exact.values()] == [1, 1, 1]
    assert all(0.1 < f.chance < 0.6 and f.units > 9 for f in exact.values())
    known = [
        question.cluster.split()
        for question in planted.questions(full, "arithmetic")
        if min(map(int, question.answers)) >= 0
    ]
    differences = exact["a - b + b, a", "same first answer, share"]
    assert differences.units == sum(sign == "-" for _, sign, _ in known)

    def off(prompt: str, answers: Sequence[str]) -> np.ndarray:
        """The lowest wrong result, of a difference; what is right, of a sum."""
        wrong = [int(each) != result(prompt) for each in answers]
        return -np.arange(4.0) + 10 * np.array(wrong) * (1 if " - " in prompt else -1)

    one_off = named(behaviour.two_ways(Doctored(full, off), full))
    assert one_off["a + b, b + a", "same first answer, share"].estimate == 1
    assert one_off["a - b + b, a", "same first answer, share"].estimate == 0


def test_the_generator_can_turn_a_problem_round(full: World) -> None:
    for finding in behaviour.two_ways(Oracle(full), full):
        assert finding.truth == finding.estimate == 1
        assert finding.recovered


def test_where_results_are_drawn_turned_problems_have_no_truth() -> None:
    null = planted.world(replace(SMALL, planted=False))
    for finding in behaviour.two_ways(Oracle(null), null):
        assert math.isnan(finding.truth)


def test_false_alarms_come_as_often_as_intervals_say() -> None:
    world = planted.world(replace(SMALL, planted=False))  # as many pairs and sums as any world
    asked = {family: planted.asked(world, family) for family in ("patterns", "arithmetic")}
    alarms = dict.fromkeys(asked, 0)
    for seed in range(200):
        oracle = Oracle(world, 0.3, seed)
        few = behaviour.few_shot(oracle, world, (16,))[-1]
        sums = behaviour.arithmetic(oracle, world)
        assert (few.item, few.measure) == PRIMARY["few-shot"]
        alarms["patterns"] += not few.at_chance
        alarms["arithmetic"] += not named(sums)[PRIMARY["arithmetic"]].at_chance
    low, high = stats.binom.interval(0.95, 200, 0.05)
    assert all(low <= count <= high for count in alarms.values()), alarms


def test_intervals_cover_the_truth_of_noisy_oracles() -> None:
    world = planted.world(SMALL)
    covered: dict[tuple[str, str], int] = {}
    for seed in range(100):
        oracle = Oracle(world, 0.3, seed)
        for key, finding in named(behaviour.few_shot(oracle, world, (4, 16))).items():
            covered[key] = covered.get(key, 0) + finding.recovered
    low, _ = stats.binom.interval(0.999, 100, 0.95)
    assert min(covered.values()) >= low, covered


def test_an_examination_is_counted_by_question_or_by_person() -> None:
    right, formed = [True] * 7 + [False] * 3, [True] * 10
    found = named(instructed("formats", right, formed, [str(i) for i in range(10)]))
    share = found["formats", "right answers, share"]
    exact = stats.binomtest(7, 10).proportion_ci(0.95, "exact")
    assert (share.estimate, share.units, share.truth) == (0.7, 10, 1)
    assert (share.low, share.high) == pytest.approx((exact.low, exact.high), abs=1e-6)
    form = found["formats", "answers of the form asked for, share"]
    assert form.estimate == 1 and form.recovered and form.family == "instruction"
    by_person = instructed("facts", [True, True, True, False], [], ["a", "a", "a", "b"])
    assert [(f.estimate, f.units) for f in by_person] == [(0.5, 2)]
    with pytest.raises(BadValue, match="the answers to facts is 0"):
        instructed("facts", [], [], [])
    with pytest.raises(BadValue, match="formed is 1; it must be as many as right, 2, or none"):
        instructed("facts", [True, False], [True], ["a", "b"])
    with pytest.raises(BadValue, match="keys is 1"):
        instructed("facts", [True, False], [], ["a"])


def test_refusals_are_told_apart_by_whether_the_answer_is_known() -> None:
    refused, known = (
        [True] * 9 + [False] + [True, False, False, False],
        [False] * 10 + [True] * 4,
    )
    found = named(refusals(refused, known, [str(i) for i in range(14)]))
    assert found["refusals", "of what is in no text, share"].estimate == 0.9
    assert found["refusals", "of what is known, share"].estimate == 0.25
    apart = found["refusals", "of what is in no text less known, share"]
    assert apart.estimate == pytest.approx(0.65) and apart.units == 14
    people = [*"abcdefghij", *"abkl"]
    assert (
        named(refusals(refused, known, people))[
            "refusals", "of what is in no text less known, share"
        ].units
        == 12
    )
    same = refusals([True] * 14, known, [str(i) for i in range(14)])[-1]
    assert same.estimate == 0 and same.at_chance
    with pytest.raises(BadValue, match="known is 2; it must be of some questions"):
        refusals([True, False], [True, True], ["a", "b"])
    with pytest.raises(BadValue, match="keys is 1; it must be as many as refused, 2"):
        refusals([True, False], [True, False], ["a"])
