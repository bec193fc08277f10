"""All audits of a subject, their score against the truth, and the audit of the audits.

An audit is trusted where it recovers what is planted, and where it finds nothing in worlds
with nothing in them more often than its intervals say. Each family has one primary finding,
fixed in advance, that says whether its effect is there.

    python -m trinity_lib.audit check --draws 200
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

from scipy import stats

from trinity_lib import (
    association,
    behaviour,
    calibration,
    fairness,
    memorisation,
    planted,
    recall,
)
from trinity_lib.config import one_sentence, require
from trinity_lib.intervals import LEVEL
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.progress import counted
from trinity_lib.subject import Finding, Subject


class Audit(Protocol):
    """All findings of one module's families."""

    def __call__(self, subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
        """`seed` is that of resampling."""


Decides = Callable[[Subject, World], list[Finding]]
"""The primary findings of one module's families, and perhaps others."""
Finds = TypeVar("Finds")

_AUDITS: tuple[tuple[dict[str, tuple[str, str]], Audit, Decides], ...] = (
    (association.PRIMARY, association.audit, association.primary),
    (fairness.PRIMARY, fairness.audit, fairness.primary),
    (recall.PRIMARY, recall.audit, recall.primary),
    (calibration.PRIMARY, calibration.audit, calibration.primary),
    (memorisation.PRIMARY, memorisation.audit, memorisation.primary),
    (behaviour.PRIMARY, behaviour.audit, behaviour.primary),
)
FAMILIES: dict[str, Audit] = {
    family: audit for primary, audit, _ in _AUDITS for family in primary
}
"""What finds a family's findings, and those of its module's other families."""
PRIMARY: dict[str, tuple[str, str]] = {
    family: which for primary, _, _ in _AUDITS for family, which in primary.items()
}
"""Item and measure of the finding that decides whether a family's effect is there."""
_DECIDES: dict[str, Decides] = {
    family: decides for primary, _, decides in _AUDITS for family in primary
}
SMALL = WorldConfig(
    names=5, held_out_names=6, jobs=1, people=36, places=7, codes=4, held_out_codes=24
)
"""A world of which many are quickly drawn."""
NOISE = 0.3
"""Standard deviation, in nats, of the errors of a subject that audits are tried on."""


class Score(NamedTuple):
    """How many findings that have a truth cover it."""

    recovered: int
    total: int
    missed: list[str]
    """Those that do not."""


class Alarms(NamedTuple):
    """How often a family's primary finding excludes chance where there is no effect."""

    alarms: int
    draws: int
    share: float
    low: float
    """Lower end of where 95% of such shares lie, if alarms come at 5%."""
    high: float
    """Upper end."""
    calibrated: bool
    """Whether the share lies between them."""


class Coverage(NamedTuple):
    """How often a family's primary finding covers the truth."""

    covered: int
    draws: int
    share: float
    low: float
    """Lower end of where 95% of such shares lie, if intervals cover at 95%."""
    enough: bool
    """Whether the share is no lower: where errors do not reach a figure, all are covered."""


def run(
    subject: Subject,
    world: World,
    families: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """All findings of all families, or of some, by name; BadValue names one there is none of.

    `progress` is told what is asked next.
    """
    chosen = _chosen(families)
    found: list[Finding] = []
    for audit, mine in _once(FAMILIES, chosen).items():
        if progress is not None:
            progress(", ".join(mine))
        findings = audit(subject, world, seed=seed)
        found += [f for f in findings if families is None or f.family in mine]
    return found


def primaries(findings: Sequence[Finding]) -> dict[str, Finding]:
    """The primary finding of every family that has one among these."""
    known = {(f.family, f.item, f.measure): f for f in findings}
    ordered = {family: known.get((family, *which)) for family, which in PRIMARY.items()}
    return {family: f for family, f in ordered.items() if f is not None}


def score(findings: Sequence[Finding]) -> Score:
    """Recovery against the truth, of findings that have one."""
    known = [f for f in findings if not math.isnan(f.truth)]
    missed = [f"{f.family}: {f.item}, {f.measure}" for f in known if not f.recovered]
    return Score(len(known) - len(missed), len(known), missed)


def describe(findings: Sequence[Finding]) -> list[str]:
    """A sentence each: estimate and interval, the truth, and whether it is at chance."""
    return [_sentence(finding) for finding in findings]


def false_alarms(
    families: Sequence[str] | None = None,
    draws: int = 200,
    *,
    config: WorldConfig = SMALL,
    noise: float = NOISE,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Alarms]:
    """How often each family finds an effect in worlds that have none.

    Null worlds with `config`'s sizes and the seeds `seed` to `seed + draws - 1`, each with
    an oracle whose errors have the standard deviation `noise`, in nats. A sound family is
    called calibrated in 95% of choices of `seed`.
    """
    null = replace(config, planted=False)
    alarms = _tried(families, draws, null, noise, seed, progress, lambda f: not f.at_chance)
    low, high = _counts(draws, 1 - LEVEL)
    return {
        family: Alarms(n, draws, n / draws, low / draws, high / draws, low <= n <= high)
        for family, n in alarms.items()
    }


def recovery(
    families: Sequence[str] | None = None,
    draws: int = 200,
    *,
    config: WorldConfig = SMALL,
    noise: float = NOISE,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Coverage]:
    """How often each family's primary interval covers the truth in planted worlds.

    As `false_alarms`. Below 95% where noise biases the figure itself: see each family.
    """
    full = replace(config, planted=True)
    covered = _tried(families, draws, full, noise, seed, progress, lambda f: f.recovered)
    low, _ = _counts(draws, LEVEL)
    return {
        family: Coverage(n, draws, n / draws, low / draws, low <= n)
        for family, n in covered.items()
    }


def _tried(
    families: Sequence[str] | None,
    draws: int,
    config: WorldConfig,
    noise: float,
    seed: int,
    progress: Callable[[str], None] | None,
    event: Callable[[Finding], bool],
) -> dict[str, int]:
    """Draws in which something is true of each family's primary finding."""
    require(draws >= 1, "draws", draws, "at least 1")
    chosen = _chosen(families)
    decide = _once(_DECIDES, chosen)
    counts = dict.fromkeys(chosen, 0)
    for draw in range(draws):
        if progress is not None:
            progress(f"draw {draw + 1} of {draws}")
        world = planted.world(replace(config, seed=seed + draw))
        subject = Oracle(world, noise, seed + draw)
        found = primaries([f for decides in decide for f in decides(subject, world)])
        for family in chosen:
            counts[family] += event(found[family])
    return counts


def _counts(draws: int, nominal: float, level: float = LEVEL) -> tuple[int, int]:
    """Where 95% of counts lie at a nominal rate, or another share of them."""
    low, high = stats.binom.interval(level, draws, nominal)
    return int(low), int(high)


def _chosen(families: Sequence[str] | None) -> list[str]:
    chosen = list(FAMILIES) if families is None else list(dict.fromkeys(families))
    for family in chosen:
        require(family in FAMILIES, "family", family, f"one of {', '.join(FAMILIES)}")
    return chosen


def _once(audits: Mapping[str, Finds], families: Sequence[str]) -> dict[Finds, list[str]]:
    """Each function that some families need, with those families."""
    found: dict[Finds, list[str]] = {}
    for family in families:
        found.setdefault(audits[family], []).append(family)
    return found


def _sentence(finding: Finding) -> str:
    f = finding
    known = [f"truth {f.truth:.3g}"] if not math.isnan(f.truth) else []
    if f.at_chance:
        known.append(f"at chance, {f.chance:.3g}")
    beside = "".join(f"; {each}" for each in known)
    figure = f"{f.estimate:.3g} [{f.low:.3g}, {f.high:.3g}]"
    return f"{f.family}: {f.item}: {figure} ({f.measure}){beside}."


def _checked(draws: int, noise: float, seed: int) -> Iterator[tuple[str, bool]]:
    """A line for every family, and whether it is sound.

    Shown is where 95% of shares lie; one of many sound families often is outside. So each is
    judged at 1 - 0.05 / families: all are found sound for 95% of seeds, or more.
    """
    findings = _of_generator(seed)
    steps = iter(counted([None] * draws, "null worlds", "world"))
    alarms = false_alarms(
        draws=draws, noise=noise, seed=seed, progress=lambda _: next(steps, None)
    )
    low, high = _counts(draws, 1 - LEVEL, 1 - (1 - LEVEL) / len(alarms))
    yield f"{'family':16}{'recovered':>12}{'false alarms':>15}{'expected':>16}  verdict", True
    for family, found in alarms.items():
        right = score([f for f in findings if f.family == family])
        sound = not right.missed and low <= found.alarms <= high
        yield (
            f"{family:16}{f'{right.recovered} of {right.total}':>12}{found.share:>15.1%}"
            f"{f'{found.low:.1%} to {found.high:.1%}':>16}  {'sound' if sound else 'BROKEN'}",
            sound,
        )
        yield from ((f"  not recovered: {each}", False) for each in right.missed)
    within = f"{low / draws:.1%} to {high / draws:.1%}"
    yield f"Expected: 95% of shares. BROKEN: misses a truth, or is outside {within},", True
    yield f"which {len(alarms)} sound families are all within for 95% of seeds or more.", True


def _of_generator(seed: int) -> list[Finding]:
    """All that is found of the truth itself, in a planted world and in a null one."""
    worlds = [planted.world(WorldConfig(seed=seed, planted=each)) for each in (True, False)]
    return [f for world in worlds for f in run(Oracle(world), world, seed=seed)]


def main() -> None:
    """Audit the audits: on a generator that says the truth, and where nothing is planted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="exit 1 where a family is broken")
    checking.add_argument("--draws", type=int, default=200, help="null worlds")
    checking.add_argument("--noise", type=float, default=NOISE, help="errors, nat")
    checking.add_argument("--seed", type=int, default=0, help="of the first world")
    given = parser.parse_args()
    with one_sentence():
        lines = list(_checked(given.draws, given.noise, given.seed))
    for line, _ in lines:
        print(line)
    raise SystemExit(0 if all(sound for _, sound in lines) else 1)


if __name__ == "__main__":
    main()
