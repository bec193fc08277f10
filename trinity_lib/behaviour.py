"""What a subject does with what it is shown, and whether it agrees with itself.

Families: few-shot (word pairs within a document), arithmetic (four results to choose from),
consistency (see there; problems asked two ways are here), and instruction, to which an
examination's marks are handed. Probabilities are normalised over the answers of a question.
An oracle's noise biases none of them: it is alike for all answers where they are equally
likely, and hardly reaches what is certain.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trinity_lib import answers, consistency, intervals, planted
from trinity_lib.config import require
from trinity_lib.consistency import agreed, agreement, first, share
from trinity_lib.oracle import OPERATIONS, Oracle
from trinity_lib.planted import Shots, Sum, World
from trinity_lib.planted_questions import SHOTS, Asked
from trinity_lib.planted_text import LABELS
from trinity_lib.subject import Finding, Subject

PRIMARY = {
    "few-shot": (f"shots {SHOTS[-1]} over control", "probability, difference"),
    "arithmetic": ("all", "probability"),
    **consistency.PRIMARY,
}
"""The finding that decides, by family: (item, measure)."""
RESULTS = 4
"""Results of a problem to choose from."""


def audit(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """Few-shot, arithmetic and consistency; every estimate is fixed, `seed` changes nothing."""
    return [
        *few_shot(subject, world),
        *arithmetic(subject, world),
        *consistency.audit(subject, world),
        *two_ways(subject, world),
    ]


def primary(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """The findings that decide, and few others."""
    return [
        *few_shot(subject, world, SHOTS[-1:]),
        *arithmetic(subject, world),
        *consistency.primary(subject, world),
    ]


def few_shot(subject: Subject, world: World, shots: Sequence[int] = SHOTS) -> list[Finding]:
    """The right label by the number of pairs shown, beside documents with random labels.

    Of keys that were shown: right is the label that a key was shown with. In the control,
    where labels are random (Min et al. 2022, arXiv 2202.12837), a key was shown with several
    and each counts by how often, so that copying one of them is only a part of right. Before
    any pair the labels are those of the pairs to come, and the key is the cluster, because
    documents ask alike; else the document is. What no document asks is left out.
    """
    every = planted.asked(world, "patterns")
    longest = {each.question.cluster: each.question.prompt for each in every}
    findings: list[Finding] = []
    for count in shots:
        fixed, control = (
            _shown(subject, _after(every, count, random), longest) for random in (False, True)
        )
        findings += _scored("few-shot", f"shots {count}", fixed, 1 / len(LABELS))
        findings += _scored("few-shot", f"control, shots {count}", control, 1 / len(LABELS))
        if count and fixed.clusters and control.clusters:
            found, truth = (
                intervals.difference(a[1], fixed.clusters, b[1], control.clusters)
                for a, b in ((fixed.said, control.said), (fixed.told, control.told))
            )
            name = ("few-shot", f"shots {count} over control", "probability, difference")
            findings.append(answers.finding(*name, found, truth.estimate, 0.0))
    return findings


def arithmetic(subject: Subject, world: World) -> list[Finding]:
    """The right result among four, over problems: all, by split, and by operation of either.

    Problems with operands swapped are one, as `world.in_validation` has it.
    A result with which another begins, as 1 with which 11 does, is the likelier for it, be it
    right or wrong. Seen are the problems that training text may have.
    """
    asked = planted.asked(world, "arithmetic")
    right = [_right(each) for each in asked]
    scores = _score(subject, asked, right, [_pair(each) for each in asked])
    groups: dict[str, list[int]] = {"all": [], "seen": [], "held out": []}
    for number, (question, about) in enumerate(asked):
        split = "held out" if isinstance(about, Sum) and about.held_out else "seen"
        for item in ("all", split, f"{split}, {question.cluster.split()[1]}"):
            groups.setdefault(item, []).append(number)
    findings = []
    for item, rows in groups.items():
        clusters = [scores.clusters[i] for i in rows]
        part = Scores(scores.said[:, rows], scores.told[:, rows], clusters)
        findings += _scored("arithmetic", item, part, 1 / RESULTS)
    return findings


def two_ways(subject: Subject, world: World) -> list[Finding]:
    """Whether turning a problem round changes what is said.

    a + b against b + a, and the same of products; and whether the first result of a - b, be
    it right or not, gives a when b is added to it. Four results to choose from each time;
    chance is that the answers to two problems stand in the same place among the four. The
    truth is the oracle's, NaN where it has no answer to a problem turned round. Of problems
    that are asked both ways the first is turned; kinds with less than two are left out.
    """
    generator, findings = Oracle(world), []
    items = {"a + b, b + a": "+", "a x b, b x a": "x", "a - b + b, a": "-"}
    for item, sign in items.items():
        every = planted.asked(world, "arithmetic")[::-1]
        asked = list({_pair(each): each for each in every if _turns(each, sign)}.values())
        if len(asked) < 2:
            continue
        turn = _undone if sign == "-" else _swapped
        said, told = turn(subject, asked), turn(generator, asked)
        truth = agreement(told, [(0, 1)])
        if (told.max(-1) < 1).any():
            truth = truth._replace(own=np.full(len(asked), math.nan))
        clusters = [_pair(each) for each in asked]
        findings.append(agreed(item, [agreement(said, [(0, 1)])], [truth], clusters))
    return findings


def instructed(
    task: str, right: Sequence[bool], formed: Sequence[bool], keys: Sequence[str]
) -> list[Finding]:
    """Right answers to a task of an examination, and answers of the form it asks for.

    One mark a question, as `rewards.right` and `rewards.formed` give them; `keys` are the
    clusters, the question's own or whom it is about. `formed` is empty where no form is asked
    for. Of refusals, right is to refuse what is in no text. BadValue where lengths differ or
    there is no answer.
    """
    require(len(right) > 0, f"the answers to {task}", len(right), "at least one")
    same = f"as many as right, {len(right)}"
    require(len(formed) in (0, len(right)), "formed", len(formed), f"{same}, or none")
    require(len(keys) == len(right), "keys", len(keys), same)
    marks = {"right answers, share": right, "answers of the form asked for, share": formed}
    return [
        answers.finding("instruction", task, measure, share(given, keys), 1.0, math.nan)
        for measure, given in marks.items()
        if len(given)
    ]


def refusals(
    refused: Sequence[bool], known: Sequence[bool], keys: Sequence[str]
) -> list[Finding]:
    """Refusals of what is in no text and of what is known, and how far the two differ.

    One entry a question: whether it was refused, and whether its answer is in the text; a key
    may be of both kinds, as a person is. The difference is 0 where all is refused alike, or
    nothing is. BadValue where lengths differ, or one kind of question is missing.
    """
    right = f"as many as refused, {len(refused)}"
    require(len(known) == len(refused), "known", len(known), right)
    require(len(keys) == len(refused), "keys", len(keys), right)
    require(0 < sum(known) < len(known), "known", sum(known), "of some questions, not of all")
    rows = list(zip(refused, known, keys, strict=True))
    absent, present = ([(float(r), c) for r, k, c in rows if k == held] for held in (0, 1))
    sides = [[each for each, _ in side] for side in (absent, present)]
    clusters = [[cluster for _, cluster in side] for side in (absent, present)]
    apart = intervals.difference(sides[0], clusters[0], sides[1], clusters[1])
    found = {
        "of what is in no text, share": (share(sides[0], clusters[0]), 1.0, math.nan),
        "of what is known, share": (share(sides[1], clusters[1]), 0.0, math.nan),
        "of what is in no text less known, share": (apart, 1.0, 0.0),
    }
    return [answers.finding("instruction", "refusals", m, *each) for m, each in found.items()]


class Scores(NamedTuple):
    """Of questions: [first answer right, probability of the right one; question]."""

    said: np.ndarray
    """The subject's."""
    told: np.ndarray
    """The generator's."""
    clusters: list[str]


def _score(
    subject: Subject,
    asked: Sequence[Asked],
    right: Sequence[np.ndarray],
    clusters: list[str],
) -> Scores:
    """`right` is the share that each answer has in being right."""
    both = []
    for nats in (answers.of_subject(subject, asked), answers.of_generator(asked)):
        pairs = list(zip(nats, right, strict=True))
        firsts = [(first(each) * shares).sum() for each, shares in pairs]
        both.append(np.array([firsts, [(np.exp(n) * shares).sum() for n, shares in pairs]]))
    said, told = both
    return Scores(said, told, clusters)


def _scored(family: str, item: str, scores: Scores, chance: float) -> list[Finding]:
    """Share of first answers that are right, and probability; none without a question."""
    if not scores.clusters:
        return []
    truth = [intervals.mean(values, scores.clusters).estimate for values in scores.told]
    right = share(scores.said[0], scores.clusters)
    probability = intervals.mean(scores.said[1], scores.clusters)
    return [
        answers.finding(family, item, "first answer right, share", right, truth[0], chance),
        answers.finding(family, item, "probability", probability, truth[1], chance),
    ]


def _after(asked: Sequence[Asked], shots: int, control: bool) -> list[Asked]:
    """Questions after so many pairs, with random labels or not."""
    return [
        each
        for each in asked
        if isinstance(each.about, Shots) and each.about[:2] == (shots, control)
    ]


def _shown(subject: Subject, asked: Sequence[Asked], longest: dict[str, str]) -> Scores:
    """Of those questions whose key was shown; before any pair, will be in the longest."""
    kept, right, clusters = [], [], []
    for each in asked:
        question = each.question
        early = isinstance(each.about, Shots) and not each.about.shots
        labels = _labels(longest[question.cluster] if early else question.prompt)
        if labels.any():
            kept.append(each)
            right.append(labels)
            clusters.append(question.prompt if early else question.cluster)
    return _score(subject, kept, right, clusters)


def _labels(prompt: str) -> np.ndarray:
    """Share of each label among those that a prompt's last key was shown with, or zeros."""
    words = prompt.split()
    pairs = list(zip(words[1:-1:2], words[2:-1:2], strict=True))
    times = np.array([pairs.count((words[-1], label)) for label in LABELS])
    return times / max(times.sum(), 1)


def _right(asked: Asked) -> np.ndarray:
    """1 for the right result of a problem, whatever the text says."""
    a, sign, b = _problem(asked)
    result = OPERATIONS[sign](a, b)
    return np.array([float(int(answer) == result) for answer in asked.question.answers])


def _problem(asked: Asked) -> tuple[int, str, int]:
    a, sign, b = asked.question.cluster.split()
    return int(a), sign, int(b)


def _pair(asked: Asked) -> str:
    """A problem, whichever way round."""
    a, sign, b = _problem(asked)
    return f"{min(a, b)} {sign} {max(a, b)}"


def _turns(asked: Asked, sign: str) -> bool:
    """Whether a problem is of a sign and can be turned round within what text tells."""
    a, own, b = _problem(asked)
    least = min(map(int, asked.question.answers))
    return own == sign and (least >= 0 if sign == "-" else a != b)


def _swapped(subject: Subject, asked: Sequence[Asked]) -> np.ndarray:
    """First answers to problems as they are and with operands swapped, [N, 2, V]."""
    results = [each.question.answers for each in asked]
    turned = ["{2} {1} {0} =".format(*_problem(each)) for each in asked]
    given = subject.score([each.question.prompt for each in asked], results)
    return np.stack(
        [first(np.array(given)), first(np.array(subject.score(turned, results)))], 1
    )


def _undone(subject: Subject, asked: Sequence[Asked]) -> np.ndarray:
    """a, and the first answer where b is added to what a - b was said to be, [N, 2, V]."""
    results = [each.question.answers for each in asked]
    given = subject.score([each.question.prompt for each in asked], results)
    prompts, options = [], []
    for each, nats in zip(asked, given, strict=True):
        a, _, b = _problem(each)
        mine = [int(answer) for answer in each.question.answers]
        prompts.append(f"{mine[int(nats.argmax())]} + {b} =")
        options.append([f" {result + b}" for result in mine])
    back = first(np.array(subject.score(prompts, options)))
    return np.stack([np.array([_right(each) for each in asked]), back], 1)
