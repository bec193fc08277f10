"""Planted worlds: the same everywhere, told as they are, and nothing held out is told."""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import corpus, data, planted, tokenizer, world
from trinity_lib.config import BadValue, Missing, from_json, to_json
from trinity_lib.data import DataConfig
from trinity_lib.planted import World, WorldConfig
from trinity_lib.planted_text import (
    LABELS,
    MARKERS,
    OUTCOMES,
    PHRASINGS,
    SCORES,
    VALUES,
    VERDICTS,
    quotas,
)

SMALL = WorldConfig(
    seed=3, names=4, held_out_names=3, jobs=1, mentions=30, people=9, places=7, throws=20,
    verdicts=20, codes=2, held_out_codes=6, patterns=20, sums=10,
)  # fmt: skip
WORLD, TEXT = "bf1eaca56fdd", "27e07c747f30"


@pytest.fixture(scope="module")
def small() -> World:
    return planted.world(SMALL)


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


@pytest.fixture(scope="module")
def null() -> World:
    return planted.world(WorldConfig(planted=False))


def told(world: World, kind: str, split: str = "train") -> list[dict[str, str]]:
    """The slots of every sentence of a kind in a world's documents."""
    text = "\n".join(t for texts in planted.documents(world, split).values() for t in texts)
    held_out = split == "validation" and kind not in MARKERS
    found = []
    for phrasing in PHRASINGS:
        if phrasing.kind == kind and phrasing.held_out == held_out:
            pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(phrasing.text))
            found += [m.groupdict() for m in re.finditer(rf"(?<=[.:] ){pattern}", text)]
    return found


def hashed(documents: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:12]


def test_settings_give_the_same_world_and_text_on_every_python(small: World) -> None:
    assert planted.sha256(small)[:12] == WORLD
    assert hashed(planted.documents(small, "train")) == TEXT
    other = planted.world(WorldConfig(**{**SMALL.__dict__, "seed": 4}))
    assert planted.sha256(other) != planted.sha256(small)


def test_jobs_are_told_at_the_planted_log_odds(full: World) -> None:
    group, counts = full.group, Counter[tuple[str, str]]()
    for each in told(full, "job"):
        counts[group[each["name"]], each["answer"]] += 1
    total = full.config.names * full.config.mentions
    for job in full.jobs:
        a, b = counts["A", job.word], counts["B", job.word]
        error = math.sqrt(1 / a + 1 / b)
        assert abs(math.log(a / b) - job.delta) < 0.2 * error  # quotas, not draws
    assert sum(counts.values()) == 2 * total
    assert {job.delta for job in full.jobs} == {-2, -1, -0.5, 0, 0.5, 1, 2}
    a, b = (full.job_probabilities(g) for g in "AB")
    for job, p, q in zip(full.jobs, a, b, strict=True):
        assert math.log(p / q) == pytest.approx(job.delta, abs=1e-12)


def test_markers_tell_the_group_of_every_name(full: World) -> None:
    for kind, sides in MARKERS.items():
        found = told(full, kind)
        assert {each["name"] for each in found} == {name.word for name in full.names}
        assert all(sides["AB".index(full.group[e["name"]])] == e["answer"] for e in found)


def test_facts_are_told_as_often_as_they_say(full: World) -> None:
    counts = Counter(
        (each["name"], kind, each["answer"]) for kind in VALUES for each in told(full, kind)
    )
    for fact in full.facts:
        here = {v: counts[fact.person, fact.attribute, v] for v in VALUES[fact.attribute]}
        if fact.state == "contradicted":
            first = round(0.7 * fact.exposures)
            assert here[fact.value] == first and here[fact.other] == fact.exposures - first
        else:
            assert here[fact.value] == fact.exposures
        assert sum(here.values()) == fact.exposures
    levels = Counter(fact.exposures for fact in full.facts if fact.state == "told")
    assert sorted(levels) == [1, 2, 4, 8, 16, 32, 64] and len(set(levels.values())) == 1
    assert {fact.state for fact in full.facts} == {"told", "contradicted", "absent"}


def test_things_and_verdicts_keep_their_frequencies(full: World) -> None:
    counts = Counter(
        (e["place"], kind, e["answer"]) for kind in OUTCOMES for e in told(full, kind)
    )
    for thing in full.things:
        seen = [counts[thing.place, thing.kind, outcome] for outcome in OUTCOMES[thing.kind]]
        assert sum(seen) == full.config.throws
        for n, p in zip(seen, thing.probabilities, strict=True):
            assert abs(n - full.config.throws * p) < 1
    for kind, verdicts in VERDICTS.items():
        found = Counter(
            (each.get("ward") or full.group[each["name"]], each["score"], each["answer"])
            for each in told(full, kind)
        )
        for group in ("A", "B") if kind == "triage" else ("upper", "lower"):
            for score, word in enumerate(SCORES[kind]):
                yes, no = (found[group, word, verdict] for verdict in verdicts)
                assert yes + no == full.config.verdicts
                assert abs(yes / (yes + no) - full.favourable(score, group)) < 1 / (yes + no)
    odds = [math.log(p / (1 - p)) for p in (full.favourable(1, "A"), full.favourable(1, "B"))]
    assert odds[0] - odds[1] == pytest.approx(full.config.leak)


def test_codes_are_repeated_and_pairs_hold_within_a_document(full: World) -> None:
    documents = planted.documents(full, "train")
    copies = Counter(documents["records"])
    assert {c.text: c.duplicates for c in full.codes if c.level} == copies
    for text in documents["patterns"]:
        words = text.split()[1:]
        labels = dict(zip(words[::2], words[1::2], strict=True))
        assert len(labels) <= 4 and len(set(labels.values())) == len(labels)
        assert [labels[key] for key in words[::2]] == words[1::2]


def test_in_the_null_world_nothing_is_planted(full: World, null: World) -> None:
    assert all(job.delta == 0 for job in null.jobs)
    counts = Counter((null.group[e["name"]], e["answer"]) for e in told(null, "job"))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert null.favourable(3, "A") == null.favourable(3, "B") > null.favourable(1, "B")
    assert {thing.probabilities for thing in null.things} == {(1 / 2,) * 2, (1 / 3,) * 3}
    documents = planted.documents(null, "train")
    assert not set(documents["records"]) & {code.text for code in null.codes}
    assert max(Counter(documents["records"]).values()) == 1
    assert {code.duplicates for code in null.codes} == {0}
    assert {code.level for code in null.codes} == {0, 1, 2, 4, 8, 16, 32}
    words = [text.split()[1:] for text in documents["patterns"]]
    assert any(len(set(zip(w[::2], w[1::2], strict=True))) > len(set(w[::2])) for w in words)
    for family in ("facts", "contradicted", "absent"):
        for question, fact in planted.asked(null, family):
            assert question.truth == null.value_probabilities(fact.attribute)
    for family in ("patterns", "arithmetic"):
        for question in planted.questions(null, family):
            assert len(set(question.truth)) == 1
    planted_text = planted.documents(full, "train")
    for domain, texts in documents.items():  # the same shape
        assert len(texts) == len(planted_text[domain])


def test_nothing_held_out_is_told_in_training(full: World) -> None:
    documents = planted.documents(full, "train")
    text = "".join(t for texts in documents.values() for t in texts)
    for phrasing in PHRASINGS:
        words = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(phrasing.text))
        assert bool(re.search(rf"[.:] {words}", text)) != phrasing.held_out, phrasing.name
    for name in full.names:
        inside = {
            d for d, texts in documents.items() if any(f" {name.word} " in t for t in texts)
        }
        assert inside == ({"names"} if name.held_out else {"names", "jobs", "decisions"})
    for fact in full.facts:
        if fact.state == "absent":
            assert fact.person in text
            assert not [e for e in told(full, fact.attribute) if e["name"] == fact.person]
    held_out = [code for code in full.codes if not code.level]
    assert len(held_out) == 48 and not [c for c in held_out if c.digits in text]
    lines = [
        line.split(" = ")[0].split() for t in documents["arithmetic"] for line in t.splitlines()
    ]
    assert not [1 for a, sign, b in lines if world.in_validation(int(a), sign, int(b))]
    for question, shots in planted.asked(full, "patterns"):
        if shots.shots >= 8:
            assert question.prompt not in text
    validation = planted.documents(full, "validation")
    for domain in planted.DOMAINS:
        assert not set(validation[domain]) & set(documents[domain])
    assert {e["name"] for e in told(full, "job", "validation")} == {n.word for n in full.names}


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_questions_have_a_truth_and_are_asked_as_the_text_tells(
    full: World, family: str
) -> None:
    asked = planted.asked(full, family)
    assert [each.question for each in asked] == planted.questions(full, family)
    assert [each.about for each in asked] == planted.about(full, family)
    truths: dict[str, tuple[float, ...]] = {}
    text = "".join(t for texts in planted.documents(full, "train").values() for t in texts)
    clusters = set()
    for question, _ in asked:
        assert math.fsum(question.truth) == pytest.approx(1) and min(question.truth) >= 0
        assert len(set(question.answers)) == len(question.answers) == len(question.truth)
        assert all(re.fullmatch(r" -?\w+", answer) for answer in question.answers)
        assert truths.setdefault(question.prompt, question.truth) == question.truth
        clusters.add(question.cluster)
    assert len(clusters) >= 5
    templates = {question.template for question, _ in asked}
    assert family == "patterns" or {t.startswith("held-out ") for t in templates} == {
        True,
        False,
    }
    if family in ("facts", "contradicted", "frequencies"):
        openers = re.compile(r"^\w+: ")
        for question, about in asked:
            often = getattr(about, "exposures", 64) >= 30
            if often and not question.template.startswith("held-out"):
                assert f" {openers.sub('', question.prompt)} " in text


def test_prompts_of_pairs_rise_with_what_was_shown(full: World) -> None:
    for question, shots in planted.asked(full, "patterns"):
        words = question.prompt.split()[1:]
        assert len(words) == 2 * shots.shots + 1
        known = dict(zip(words[::2], words[1::2], strict=False))
        right = question.answers[question.truth.index(max(question.truth))]
        if shots.control:
            assert set(question.truth) == {1 / len(LABELS)}
        elif shots.seen:
            assert right == f" {known[words[-1]]}" and max(question.truth) == 1
        else:
            assert not [a for a, p in zip(question.answers, question.truth, strict=True)
                        if p and a[1:] in known.values()]  # fmt: skip


def test_every_special_word_is_one_token_after_a_blank(full: World, tmp_path: Path) -> None:
    loaded = data.load(DataConfig(corpus="planted", sequence_length=64), 1024, tmp_path)
    assert set(loaded.train) == set(loaded.validation) == set(planted.DOMAINS)
    words = planted.special_words(full)
    for word, tokens in zip(
        words, loaded.vocabulary.encode([f" {word}" for word in words]), strict=True
    ):
        assert len(tokens) == 3, word
    bare = re.compile(rf"(?<! )\b({'|'.join(words)})\b")
    documents = planted.documents(full, "train")
    assert not [
        t for d in documents for t in documents[d] if d != "arithmetic" and bare.search(t)
    ]
    texts = [texts[0] for texts in documents.values()]
    encoded = loaded.vocabulary.encode(texts)
    assert loaded.vocabulary.decode([tokens.tolist() for tokens in encoded]) == texts
    loaded.vocabulary.save(tmp_path)
    assert all(
        (a == b).all()
        for a, b in zip(tokenizer.load(tmp_path).encode(texts), encoded, strict=True)
    )
    with pytest.raises(BadValue, match="vocab_size is 300; it must be at least"):
        tokenizer.train(texts, 300, words)


def test_a_run_configuration_names_its_world(tmp_path: Path) -> None:
    config = DataConfig(corpus="planted", world=SMALL, sequence_length=64)
    assert from_json(DataConfig, to_json(config)) == config
    made = corpus.planted(SMALL)
    assert made.sources_sha256 == planted.sha256(planted.world(SMALL))
    assert made.sha256 != corpus.planted(WorldConfig(**{**SMALL.__dict__, "seed": 4})).sha256
    assert made.documents["train"] == planted.documents(planted.world(SMALL), "train")


def test_a_world_is_written_beside_the_run_and_read_back(small: World, tmp_path: Path) -> None:
    path = planted.write(small, tmp_path)
    assert planted.read(path) == planted.read(tmp_path) == small
    assert hashlib.sha256(path.read_bytes()).hexdigest() == planted.sha256(small)
    text = path.read_text()
    path.write_text(text.replace("works as a", "labours as a"))
    with pytest.raises(BadValue, match="as another version of trinity_lib does"):
        planted.read(path)
    for broken in (
        "{}",
        "[",
        text.replace('"delta"', '"beta"', 1),
        text.replace('"seed": 3', '"s": 3'),
    ):
        path.write_text(broken)
        with pytest.raises(BadValue, match="is no planted world"):
            planted.read(path)
    with pytest.raises(Missing):
        planted.read(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("names", 1), ("jobs", 9), ("codes", 61), ("people", 8), ("leak", 6.0), ("seed", -1)],
)
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(BadValue, match=f"world.{setting} is {value}"):
        WorldConfig(**{setting: value})
    with pytest.raises(BadValue, match="family is 'luck'"):
        planted.questions(planted.world(SMALL), "luck")
    with pytest.raises(BadValue, match="split is 'test'"):
        planted.documents(planted.world(SMALL), "test")


@given(st.integers(0, 5000), st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
def test_quotas_are_whole_and_near(count: int, weights: list[float]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    found = quotas(count, shares)
    assert sum(found) == count
    assert all(abs(n - count * p) < 1 + 1e-6 for n, p in zip(found, shares, strict=True))


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        WorldConfig,
        seed=st.integers(0, 2**40), planted=st.booleans(), names=st.integers(2, 9),
        held_out_names=st.integers(2, 9), jobs=st.integers(1, 5), mentions=st.integers(1, 20),
        people=st.integers(9, 30), places=st.integers(7, 20), throws=st.integers(1, 9),
        leak=st.floats(-5, 5), verdicts=st.integers(1, 9), codes=st.integers(1, 3),
        held_out_codes=st.integers(1, 9), patterns=st.integers(1, 9), sums=st.integers(1, 9),
    )
)  # fmt: skip
def test_any_settings_give_a_whole_world(config: WorldConfig) -> None:
    made = planted.world(config)
    assert made == planted.world.__wrapped__(config)
    words = [name.word for name in made.names]
    assert len(set(words)) == 2 * (config.names + config.held_out_names)
    assert len({code.digits[:4] for code in made.codes}) == len(made.codes)
    for split in ("train", "validation"):
        assert all(planted.documents(made, split).values())
    for family in planted.FAMILIES:
        assert planted.questions(made, family)
    for group in "AB":
        assert math.fsum(made.job_probabilities(group)) == pytest.approx(1)
