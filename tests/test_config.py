"""Settings: round trips, overrides, coercion, and one sentence for every mistake."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trinity_lib import config
from trinity_lib.attention import AttentionConfig
from trinity_lib.config import check
from trinity_lib.model import ModelConfig
from trinity_lib.routing import RouterConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, int] | None = None
    shares: dict[str, float]

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    flag: bool = False
    inner: Inner
    many: tuple[Inner, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        check(self)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
INNERS = st.builds(
    Inner,
    rate=FINITE,
    kind=st.sampled_from(["a", "b"]),
    pair=st.none() | st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    shares=st.dictionaries(st.text(max_size=3), FINITE, max_size=3),
)
OUTERS = st.builds(
    Outer,
    steps=st.integers(-(2**40), 2**40),
    flag=st.booleans(),
    inner=INNERS,
    many=st.lists(INNERS, max_size=3).map(tuple),
    name=st.none() | st.text(max_size=5),
)


@hypothesis_settings(deadline=None)
@given(OUTERS)
def test_json_round_trip(settings: Outer) -> None:
    text = config.to_json(settings)
    assert config.from_json(Outer, text) == settings
    assert config.digest(config.from_json(Outer, text)) == config.digest(settings)


OUTER = Outer(steps=3, inner=Inner(shares={"x": 1.0}))


def test_override_reaches_nested_settings() -> None:
    changed = config.override(OUTER, {"steps": 4, "inner.rate": 2, "inner.kind": "b"})
    assert (changed.steps, changed.inner.rate, changed.inner.kind) == (4, 2.0, "b")
    assert changed.inner.shares == {"x": 1.0} and OUTER.steps == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stpes": 1}, "Outer has no setting 'stpes'; it has flag, inner"),
        ({"stpes": 1}, r"name, steps \(did you mean 'steps'\?\)\.$"),
        ({"inner.rat": 1}, "Inner has no setting 'rat'"),
        ({"steps": "three"}, "steps is 'three'; it must be a whole number"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": None}, "steps is None; it must be a whole number"),
        ({"steps": "nan"}, "it must be a whole number"),
        ({"inner.rate": "fast"}, "rate is 'fast'; it must be a number"),
        ({"inner.kind": "c"}, "kind is 'c'; it must be one of a, b\\.$"),
        ({"inner.kind": "aa"}, r"must be one of a, b \(did you mean 'a'\?\)\.$"),
        ({"inner.pair": [1]}, r"pair is \[1\]; it must be a list of 2"),
        ({"inner.pair": 7}, "pair is 7; it must be a list"),
        ({"inner.shares": 7}, "shares is 7; it must be a mapping"),
        ({"inner.shares": {"x": "y"}}, "shares.x is 'y'; it must be a number"),
        ({"flag": "yes"}, "flag is 'yes'; it must be true or false"),
        ({"flag": 1}, "flag is 1; it must be true or false"),
        ({"name": 3}, "name is 3; it must be text"),
    ],
)
def test_mistakes_are_one_sentence(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        config.override(OUTER, changes)
    assert "\n" not in str(error.value)


def test_text_that_spells_a_value_is_taken() -> None:
    changed = config.override(OUTER, {"steps": "12", "flag": "false", "inner.rate": "1e-3"})
    assert (changed.steps, changed.flag, changed.inner.rate) == (12, False, 1e-3)
    assert config.override(OUTER, {"steps": 4.0}).steps == 4


def test_unknown_and_missing_keys_in_json() -> None:
    values = json.loads(config.to_json(OUTER))
    values["inner"]["extra"] = 1
    with pytest.raises(ValueError, match="Inner has no setting 'extra'"):
        config.from_json(Outer, json.dumps(values))
    with pytest.raises(ValueError, match="Outer lacks steps, inner"):
        config.from_json(Outer, "{}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "Outer is not JSON: Expecting"), ('{"stps": 1}', "Outer has no setting 'stps'")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(config.BadValue) as error:
        config.from_file(Outer, file)
    assert str(error.value).startswith(f"--config {file}: {sentence}")


PRINTS = """
import sys
from trinity_lib.config import BadValue, one_sentence
with one_sentence():
    sys.stdin.read()  # until nobody reads what is printed
    print("line\\n" * {lines})
    {then}
"""


@pytest.mark.parametrize(
    ("unbuffered", "lines", "then", "code", "shown"),
    [
        ("", 1, "", 0, ""),
        ("", 1, "raise SystemExit(0)", 0, ""),
        ("", 1, "raise BadValue('A sentence.')", 1, "A sentence."),
        ("", 100_000, "", 1, ""),
        ("1", 1, "", 1, ""),
    ],
)
def test_a_reader_that_stops_early_shows_no_traceback(
    unbuffered: str, lines: int, then: str, code: int, shown: str
) -> None:
    command = [sys.executable, "-c", PRINTS.format(lines=lines, then=then)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read().strip() == shown
    assert process.returncode == code


def test_another_broken_pipe_is_a_defect() -> None:
    with pytest.raises(BrokenPipeError, match="a socket's"), config.one_sentence():
        raise BrokenPipeError("a socket's")


POSITIVE = st.floats(1e-8, 1e8)
MODELS = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 2**20),
    width=st.integers(1, 4096),
    num_layers=st.integers(3, 99),
    num_dense_layers=st.integers(0, 2),
    dense_width=st.integers(1, 4096),
    expert_width=st.integers(1, 4096),
    num_shared_experts=st.integers(0, 3),
    global_every=st.integers(1, 9),
    norm_eps=POSITIVE,
    attention=st.builds(
        AttentionConfig,
        num_heads=st.sampled_from([4, 8, 48]),
        num_kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.integers(1, 64).map(lambda half: 2 * half),
        window=st.integers(1, 8192),
        rope_theta=POSITIVE,
    ),
    router=st.integers(1, 512).flatmap(
        lambda experts: st.builds(
            RouterConfig,
            num_experts=st.just(experts),
            top_k=st.integers(1, experts),
            route_scale=POSITIVE,
        )
    ),
)


@hypothesis_settings(deadline=None)
@given(MODELS)
def test_a_nested_model_config_round_trips(settings: ModelConfig) -> None:
    again = config.from_json(ModelConfig, config.to_json(settings))
    assert again == settings and type(again.router) is RouterConfig


@hypothesis_settings(deadline=None)
@given(MODELS, st.sampled_from(["", "attention", "router"]), st.text(min_size=1, max_size=8))
def test_an_unknown_key_at_any_depth_is_named(
    settings: ModelConfig, where: str, key: str
) -> None:
    values = json.loads(config.to_json(settings))
    target = values[where] if where else values
    key = f"x{key}"  # no setting starts so
    target[key] = 1
    owner = {"": "ModelConfig", "attention": "AttentionConfig", "router": "RouterConfig"}[where]
    with pytest.raises(ValueError) as error:
        config.from_json(ModelConfig, json.dumps(values))
    assert str(error.value).startswith(f"{owner} has no setting {key!r}; it has ")


def test_an_unknown_key_inside_a_list_is_named() -> None:
    text = '{"steps": 1, "inner": {"shares": {}}, "many": [{"shares": {}, "extra": 1}]}'
    with pytest.raises(ValueError, match="Inner has no setting 'extra'"):
        config.from_json(Outer, text)


def test_settings_that_must_agree_move_together(tiny_model: ModelConfig) -> None:
    changes = {"attention.num_heads": "6", "attention.num_kv_heads": 3, "width": "48"}
    changed = config.override(tiny_model, changes)
    assert (changed.attention.num_heads, changed.attention.num_kv_heads) == (6, 3)
    assert changed.width == 48 and changed.router == tiny_model.router
    with pytest.raises(ValueError, match=r"num_kv_heads is 3; .* num_heads \(2\)"):
        config.override(tiny_model, {"attention.num_kv_heads": 3})


def test_whole_numbers_are_exact_beyond_what_a_float_holds() -> None:
    assert config.override(OUTER, {"steps": 2**53 + 1}).steps == 2**53 + 1
    assert config.override(OUTER, {"steps": str(2**53 + 1)}).steps == 2**53 + 1
