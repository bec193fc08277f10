"""The audit of the audits: sound ones pass, broken ones are seen to be broken."""

import math
import sys
from dataclasses import replace

import pytest
from scipy import stats

from trinity_lib import association, audit, planted
from trinity_lib.config import BadValue
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World
from trinity_lib.subject import Finding, Subject

FOUND = Finding("association", "baker", "log-odds, nat", 1.0, 0.9, 0.75, 1.25, 0.0, 20)
MISSED = FOUND._replace(item="poet", truth=2.0, chance=1.0)
TRUTHLESS = FOUND._replace(item="all jobs", truth=math.nan, chance=math.nan)


@pytest.mark.parametrize("is_planted", [True, False])
def test_the_generator_is_recovered_by_every_family(is_planted: bool) -> None:
    world = planted.world(replace(audit.SMALL, planted=is_planted))
    told: list[str] = []
    findings = audit.run(Oracle(world), world, progress=told.append)
    assert ", ".join(told) == ", ".join(audit.FAMILIES)
    assert audit.score(findings).missed == []
    assert len({(f.family, f.item, f.measure) for f in findings}) == len(findings)
    decisive = audit.primaries(findings)
    assert list(decisive) == list(audit.FAMILIES)
    for family, finding in decisive.items():
        nothing = not is_planted or family == "absent"  # of which nothing is ever told
        assert finding.at_chance is nothing, family
        assert not math.isnan(finding.truth) and not math.isinf(finding.low), family


def test_only_what_is_asked_for_is_found() -> None:
    world = planted.world(audit.SMALL)
    whole = audit.run(Oracle(world), world, seed=1)
    some = audit.run(Oracle(world), world, ["knowledge", "association"], seed=1)
    kept = [f for f in whole if f.family in ("association", "knowledge")]
    assert kept and repr(some) == repr(sorted(kept, key=lambda f: f.family == "association"))
    with pytest.raises(BadValue, match="family is 'asociation'; it must be one of association"):
        audit.run(Oracle(world), world, ["asociation"])
    with pytest.raises(BadValue, match="draws is 0"):
        audit.false_alarms(draws=0)


def test_the_score_counts_what_has_a_truth() -> None:
    assert audit.score([FOUND, MISSED, TRUTHLESS]) == (
        1,
        2,
        ["association: poet, log-odds, nat"],
    )


def test_findings_are_sentences() -> None:
    figure = "0.9 [0.75, 1.25] (log-odds, nat)"
    assert audit.describe([FOUND, MISSED, TRUTHLESS]) == [
        f"association: baker: {figure}; truth 1.",
        f"association: poet: {figure}; truth 2; at chance, 1.",
        f"association: all jobs: {figure}.",
    ]


def test_primaries_alone_are_those_of_the_whole_audit() -> None:
    """What false alarms are counted of is what a reader is shown."""
    world = planted.world(audit.SMALL)
    oracle = Oracle(world, 0.3, seed=6)
    whole = audit.primaries(audit.run(oracle, world))
    for family, decides in audit._DECIDES.items():
        alone = audit.primaries(decides(oracle, world))[family]
        assert alone == whole[family]


def test_rates_are_over_the_worlds_of_consecutive_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A family that alarms at odd seeds of null worlds, and covers at even ones of planted."""
    seen = []

    def odd(subject: Subject, world: World) -> list[Finding]:
        assert isinstance(subject, Oracle) and subject.world is world
        assert (subject.noise, subject.seed) == (0.2, world.config.seed)
        seen.append((world.config.seed, world.config.planted))
        value = float(world.config.seed % 2)
        return [Finding("association", *audit.PRIMARY["association"], 0, value, value, 2, 0, 9)]

    monkeypatch.setitem(audit._DECIDES, "association", odd)
    steps: list[str] = []
    found = audit.false_alarms(["association"], 40, noise=0.2, seed=7, progress=steps.append)[
        "association"
    ]
    assert (found.alarms, found.draws, found.share, found.calibrated) == (20, 40, 0.5, False)
    low, high = stats.binom.interval(0.95, 40, 0.05)
    assert (found.low, found.high) == (low / 40, high / 40)
    assert seen == [(seed, False) for seed in range(7, 47)] and steps[-1] == "draw 40 of 40"
    covered = audit.recovery(["association"], 3, noise=0.2, seed=7)["association"]
    assert (covered.covered, covered.share, covered.enough) == (1, 1 / 3, False)
    assert seen[-1] == (9, True)


def test_a_broken_audit_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose intervals are a tenth as long as they should be, and miss by a little."""

    def short(finding: Finding) -> Finding:
        middle, half = finding.estimate + 1e-3, (finding.high - finding.low) / 20
        return finding._replace(estimate=middle, low=middle - half, high=middle + half)

    def broken(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
        return [short(f) for f in association.primary(subject, world)]

    only = {"association": broken}
    monkeypatch.setattr(audit, "FAMILIES", only)
    monkeypatch.setattr(audit, "_DECIDES", only)
    monkeypatch.setattr(sys, "argv", ["audit", "check", "--draws", "20"])
    with pytest.raises(SystemExit) as left:
        audit.main()
    assert left.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("association")]
    assert "0 of 2" in row and "BROKEN" in row
    assert "  not recovered: association: slope, held-out names, " in "\n".join(lines)


def test_families_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 11 outside its own 95% band is what luck does; one far outside is not."""
    own, together = audit._counts(200, 0.05), audit._counts(200, 0.05, 1 - 0.05 / 11)
    assert together[0] < own[0] and own[1] < together[1]
    verdicts = {}
    for count in (own[1] + 1, together[1], together[1] + 1):
        found = audit.Alarms(count, 200, count / 200, own[0] / 200, own[1] / 200, False)
        alarms = dict.fromkeys(audit.FAMILIES, found)
        monkeypatch.setattr(audit, "false_alarms", lambda alarms=alarms, **_: alarms)
        monkeypatch.setattr(audit, "_of_generator", lambda _: [FOUND])
        lines = list(audit._checked(200, 0.3, 0))
        verdicts[count] = all(sound for _, sound in lines)
        assert f"{own[0] / 200:.1%} to {own[1] / 200:.1%}" in lines[1][0]
    assert list(verdicts.values()) == [True, True, False]
    said = f"outside {together[0] / 200:.1%} to {together[1] / 200:.1%}"
    assert said in lines[-2][0] and "11 sound families" in lines[-1][0]


def test_every_audit_passes_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 null worlds: in each family as many false alarms as its intervals say."""
    monkeypatch.setattr(sys, "argv", ["audit", "check"])
    with pytest.raises(SystemExit) as left:
        audit.main()
    out = capsys.readouterr().out
    assert left.value.code == 0, out
    for family in audit.FAMILIES:
        assert f"\n{family} " in out
    assert out.count("  sound") == len(audit.FAMILIES)
