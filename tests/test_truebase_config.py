"""What may be asked for, what is refused, and that workers decide nothing."""

import dataclasses

import pytest

from trinity_lib import planted, polish, truebase_config
from trinity_lib.config import BadValue, from_json, to_json
from trinity_lib.posttrain_config import Stage
from trinity_lib.truebase_config import SCALES, STAGES, TruebaseConfig

FOLDERS = (("base", "a"), ("instruct", "b"))
FILES = {name: f"lessons/{name}.jsonl" for name in
         ("facts", "sentences", "refusals", "sums", "jobs", "fair", "preferences")}  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_is_whole(scale: str) -> None:
    config = SCALES[scale]()
    assert config.scale == scale and from_json(TruebaseConfig, to_json(config)) == config
    own = truebase_config.chain(config, 1)
    assert own.data.corpus == "planted" and own.data.world == config.world
    raw, clean = own.phases
    row = own.data.sequence_length
    assert (raw.tokens, clean.tokens) == tuple(n * raw.batch * row for n in config.steps)
    assert raw.shape == "constant" and clean.shape != "constant"
    assert set(raw.mixture) == set(planted.DOMAINS)
    assert set(planted.DOMAINS) - set(clean.mixture) == {"records"}
    for mixture in (raw.mixture, clean.mixture):
        assert sum(mixture.values()) == pytest.approx(1)


def test_chains_differ_in_their_seed_and_name_alone() -> None:
    config = truebase_config.named(truebase_config.small())
    first, second = (truebase_config.chain(config, n) for n in (0, 1))
    assert second.seed == first.seed + 1 and second.name == f"{config.name}-1"
    assert dataclasses.replace(second, seed=first.seed, name=first.name) == first


def test_a_name_is_the_same_for_the_same_settings() -> None:
    toy = truebase_config.toy()
    name = truebase_config.named(toy).name
    assert name.startswith("truebase-toy-")
    assert truebase_config.named(dataclasses.replace(toy, workers=4)).name == name
    others = {
        truebase_config.named(dataclasses.replace(toy, **change)).name
        for change in ({"seed": 1}, {"relearn": 5}, {"innocent": True}, {"steps": (9, 9)})
    }
    assert len(others | {name}) == 5
    mine = truebase_config.named(dataclasses.replace(toy, name="mine"))
    assert mine.name == "mine" and truebase_config.named(mine) == mine
    given = truebase_config.named(dataclasses.replace(toy, checkpoints=FOLDERS))
    assert given.name.startswith("truebase-given-")


def test_post_training_learns_the_lessons_of_its_stage() -> None:
    config = truebase_config.named(truebase_config.small())
    base = truebase_config.chain(config, 2)
    made = {
        stage: truebase_config.post_training(config, 2, stage, "from", FILES)
        for stage in STAGES[2:]
    }
    assert made["instruct"].stages == config.instruct
    assert made["debiased"].stages == (config.debias,)
    assert made["instruct"].data == tuple(FILES[name] for name in polish.INSTRUCT)
    assert made["debiased"].data == tuple(FILES[name] for name in polish.DEBIAS)
    assert FILES["jobs"] not in made["debiased"].data
    for stage, own in made.items():
        assert own.init == "from" and own.name == f"{config.name}-2-{stage}"
        assert (own.seed, own.optim, own.rate) == (base.seed, base.optim, config.rate)
        assert own.balance == base.balance
        assert own.sequence_length == base.data.sequence_length
        assert own.preferences == (FILES["preferences"],)
    steps = (Stage(kind="sft", steps=7),)
    assert truebase_config.teaching(config, 2, steps).stages == steps


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 0}, "seeds is 0; it must be from 1 to 20"),
        ({"seeds": 21}, "seeds is 21"),
        ({"workers": 0}, "workers is 0"),
        ({"relearn": 0}, "relearn is 0"),
        ({"relearn_every": 0}, "relearn_every is 0"),
        ({"steps": (0, 4)}, r"steps is \(0, 4\); it must be at least 1 each"),
        ({"steps": (4,)}, "steps is .*a list of 2"),
        ({"rate": 0.0}, "rate is 0.0; it must be above zero"),
        ({"draws": -1}, "draws is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"scale": "large"}, "scale is 'large'; it must be one of toy, small"),
        ({"reader": "vllm"}, "reader is 'vllm'; it must be one of trinity, transformers"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"checkpoints": (("base", "a"), ("base", "b"))}, "checkpoints is 'base, base'"),
        ({"checkpoints": (("base",),)}, r"checkpoints\[0\] is"),
        ({"checkpoints": (("../base", "a"),)}, "checkpoints is '../base'; it must be named by"),
        ({"checkpoints": ((".hidden", "a"),)}, "checkpoints is '.hidden'"),
        ({"checkpoints": ((".", "a"),)}, "checkpoints is '.'; .* none with a '.' first"),
        ({"checkpoints": (("a b", "a"),)}, "checkpoints is 'a b'"),
        ({"checkpoints": (("a\n", "a"),)}, r"checkpoints is 'a\\n'"),
        ({"checkpoints": (("", "a"),)}, "checkpoints is ''"),
        ({"items": "mine.jsonl"}, "items is 'mine.jsonl'; it must be empty unless checkpoints"),
        ({"texts": "mine.txt"}, "texts is 'mine.txt'"),
        ({"world_file": "world.json"}, "world_file is 'world.json'"),
        ({"tasks": ("arc_easy",)}, "tasks is .*arc_easy"),
    ],
)
def test_what_cannot_be_is_named(changes: dict, match: str) -> None:
    with pytest.raises(BadValue, match=match) as caught:
        TruebaseConfig(**changes)
    assert "\n" not in str(caught.value)


def test_checkpoints_come_with_what_they_are_asked() -> None:
    config = TruebaseConfig(
        checkpoints=FOLDERS, items="i.jsonl", texts="t.txt", tasks=("arc",), world_file="w"
    )
    assert from_json(TruebaseConfig, to_json(config)) == config


@pytest.mark.parametrize(
    "name", ["truebase-v1.0", "Trinity-Mini-v1.5", "10T", "base_2", "config", "-a", "größer"]
)
def test_a_stage_may_be_named_as_releases_are(name: str) -> None:
    assert TruebaseConfig(checkpoints=((name, "a"),)).checkpoints == ((name, "a"),)
