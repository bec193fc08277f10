"""What a chain's checkpoints hold inside: where answers form, and which experts count.

The questions are the planted world's, so that each has a truth.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import xarray as xr

from trinity_lib import (
    ablation,
    answers,
    association,
    hidden,
    lens,
    planted,
    polish,
    probing,
    relearning,
    stage_schema,
    truebase_config,
)
from trinity_lib.asked import Asked
from trinity_lib.dialogues import ask
from trinity_lib.intervals import Interval
from trinity_lib.interview import Checkpoint
from trinity_lib.model import Trinity
from trinity_lib.planted import World
from trinity_lib.planted_questions import Asked as About
from trinity_lib.planted_tables import GROUPS, Fact, Name
from trinity_lib.planted_text import PHRASINGS, VALUES
from trinity_lib.posttrain_config import Stage
from trinity_lib.truebase_config import STAGES, TruebaseConfig

PLACES = ("name", "end of text", "end of question")
"""Where a name's group is looked for: at the name, and where its job is said next."""
OLD, NEW = "the association", "its opposite"
"""What is learnt again, and what is learnt beside it for comparison."""
INNOCENT = "never had it"
"""The start that was never told the association."""
TARGET = 0.25
"""Log-odds per planted log-odds that count as learnt: a quarter of what was planted."""
RECALLED = 48
"""Facts that an expert's share in recall is judged by, at most."""


class Chain(NamedTuple):
    """A chain's checkpoints, read, in their order."""

    read: Mapping[str, Checkpoint]
    world: World
    innocent: Checkpoint | None = None
    """One that never had the association."""

    @property
    def probed(self) -> dict[str, Checkpoint]:
        """All of them, the stages first."""
        return {**self.read, **({INNOCENT: self.innocent} if self.innocent else {})}


def look(
    chain: Chain, config: TruebaseConfig, number: int, tell: Callable[[str], None]
) -> dict[str, xr.Dataset]:
    """The groups `lens`, `attribute_probe`, `relearning` and, if asked for, `ablation`."""
    tell("logit lens")
    found = {"lens": _lens(chain)}
    tell("probes")
    found["attribute_probe"] = _probes(chain, config.seed)
    found["association_lens"] = _association_lens(chain)
    tell("relearning")
    found["relearning"] = _relearning(chain, config, number)
    if config.ablate:
        tell("every expert taken out")
        found["ablation"] = _ablation(chain)
    return found


def known_facts(world: World) -> list[About]:
    """Facts told often, each in its first phrasing."""
    kept: dict[Fact, About] = {}
    for each in planted.asked(world, "facts"):
        fact = each.about
        if isinstance(fact, Fact) and fact.exposures >= polish.LEARNT:
            kept.setdefault(fact, each)
    return list(kept.values())


def _lens(chain: Chain) -> xr.Dataset:
    """Facts told often: after which block the told value is what would be said."""
    facts = known_facts(chain.world)
    values = [each.about.value for each in facts if isinstance(each.about, Fact)]
    found = {}
    for stage, (model, vocabulary, *_) in chain.read.items():
        wanted = lens.targets(
            vocabulary,
            [each.question.prompt for each in facts],
            [f" {value}" for value in values],
            [each.question.cluster for each in facts],
        )
        found[stage] = lens.of_targets(model, wanted)
    return lens.dataset(found)


def _probes(chain: Chain, seed: int) -> xr.Dataset:
    """Whether a name's group can be read off by a line, place by place and block by block.

    Of a model that never had the association too, if there is one: what marks the groups is
    told in every world, so a group that can be read off is by itself no hidden association.
    """
    names = chain.world.names
    words = [name.word for name in names]
    phrasings = [p for p in PHRASINGS if p.kind == "job" and not p.held_out]
    texts = [p.prompt(name="{name}") for p in phrasings]
    by_place: dict[str, dict[str, probing.Probe]] = {}
    for place in PLACES:
        found = by_place[place] = {}
        for stage, (model, vocabulary, _, template) in chain.probed.items():
            assert template is not None  # the chain's own tokenizer has an end mark
            read = probing.at_names if place == PLACES[0] else probing.at_ends
            question = template.text(ask(polish.JOB.format(name="{name}")))
            prompts = [question] if place == PLACES[2] else texts
            found[stage] = probing.probe(
                read(model, vocabulary, words, prompts),
                [name.group == GROUPS[0] for name in names],
                [name.held_out for name in names],
                seed=seed,
            )
    return probing.dataset(by_place)


def _association_lens(chain: Chain) -> xr.Dataset:
    """The association that an answer would have if a block were the last: held-out names.

    The slope on planted log-odds of what the logit lens says of the jobs, with Welch's
    interval over names.
    """
    names = [name for name in chain.world.names if name.held_out]
    phrasings = [p for p in PHRASINGS if p.kind == "job" and not p.held_out]
    texts = [p.prompt(name=name.word) for name in names for p in phrasings]
    found: dict[str, list[list[Interval]]] = {place: [] for place in PLACES[1:]}
    for model, vocabulary, _, template in chain.probed.values():
        assert template is not None  # the chain's own tokenizer has an end mark
        said = [template.text(ask(polish.JOB.format(name=name.word))) for name in names]
        ends = hidden.last(vocabulary, [f"{said[0]} {job.word}" for job in chain.world.jobs])
        jobs = [int(end.tokens[-1]) for end in ends]
        for place, prompts in zip(PLACES[1:], (texts, said), strict=True):
            nats = lens.shares(model, hidden.last(vocabulary, prompts), jobs)
            by_name = nats.reshape(len(nats), len(names), -1, len(jobs)).mean(2)
            slopes = [association.slope_of(chain.world, names, block) for block in by_name]
            found[place].append(slopes)
    fields = {"slope": "estimate", "low": "low", "high": "high", "units": "units"}
    values = {
        name: [[[getattr(i, key) for i in row] for row in rows] for rows in found.values()]
        for name, key in fields.items()
    }
    blocks = np.arange(len(found[PLACES[1]][0]))
    at = {"lens_place": list(found), "probed": list(chain.probed), "block": blocks}
    return stage_schema.dataset("association_lens", values, at)


def _relearning(chain: Chain, config: TruebaseConfig, number: int) -> xr.Dataset:
    """How soon the debiased model answers with the association again, and with its opposite.

    And how soon a model learns it that never had it, if there is one. Taught with every other
    of the names with jobs, looked at in all the others.
    """
    last = chain.read[STAGES[-1]]
    assert last.template is not None
    template, world = last.template, chain.world
    taught = {q.key for q in polish.relearning(world, opposite=False)}
    asked = [
        q
        for q, name in zip(polish.association(world, template), world.names, strict=True)
        if polish.JOB.format(name=name.word) not in taught
    ]

    def slope(model: Trinity) -> float:
        return association.slope(Asked(model, last.vocabulary), world, asked).estimate

    starts = {STAGES[-1]: relearning.Start(last.model, template)}
    if chain.innocent is not None:
        assert chain.innocent.template is not None
        starts[INNOCENT] = relearning.Start(chain.innocent.model, chain.innocent.template)
    lessons = {
        name: relearning.Lesson(polish.relearning(world, opposite=opposite), target)
        for name, opposite, target in ((OLD, False, TARGET), (NEW, True, -TARGET))
    }
    looks = [*range(0, config.relearn, config.relearn_every), config.relearn]
    return relearning.relearn(
        starts,
        lessons,
        slope,
        looks,
        truebase_config.teaching(config, number, (Stage(kind="sft", steps=config.relearn),)),
    )


def _ablation(chain: Chain) -> xr.Dataset:
    """What of the association, and of recall, goes with each expert of the Base."""
    model, vocabulary, *_ = chain.read[STAGES[1]]
    facts = known_facts(chain.world)[:RECALLED]
    right = [
        VALUES[each.about.attribute].index(each.about.value)
        for each in facts
        if isinstance(each.about, Fact)
    ]
    asked = [
        each.question
        for each in planted.asked(chain.world, "association")
        if isinstance(each.about, Name)
        and each.about.held_out
        and not each.question.template.startswith("held-out")
    ]

    def slope(model: Trinity) -> float:
        return association.slope(Asked(model, vocabulary), chain.world, asked).estimate

    def recall(model: Trinity) -> float:
        found = answers.of_subject(Asked(model, vocabulary), facts)
        shares = [np.exp(nats[at]) for nats, at in zip(found, right, strict=True)]
        return float(np.mean(shares))

    measures = {"association": slope, "recall": recall}
    return ablation.dataset({STAGES[1]: ablation.effects(model, measures)})
