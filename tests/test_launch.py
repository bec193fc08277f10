"""A notebook's parameters: coerced or refused in one sentence, before any work."""

import inspect
import json
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from trinity_lib import launch, recipes

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "train.ipynb"


def test_none_takes_the_scales_own_values() -> None:
    assert launch.configure() == recipes.toy()
    assert launch.configure(scale="small", seed=0) == recipes.small()


def test_parameters_reach_their_settings() -> None:
    config = launch.configure(
        steps=60, seed=3, balance="sign", balance_rate=2e-2, num_experts=256, top_k=2, rsdb=0
    )
    assert sum(config.steps) == 60 and config.seed == 3
    assert (config.balance.method, config.balance.rate) == ("sign", 2e-2)
    assert (config.model.router.num_experts, config.model.router.top_k) == (256, 2)
    assert config.data.rsdb == 0


def test_the_learning_rate_keeps_the_ratio() -> None:
    toy = recipes.toy().optim
    half = launch.configure(learning_rate=toy.muon_rate / 2).optim
    assert half.muon_rate == toy.muon_rate / 2
    assert half.adamw_rate == pytest.approx(toy.adamw_rate / 2)
    adamw = launch.configure(optimizer="adamw", learning_rate=1e-3).optim
    assert adamw.adamw_rate == pytest.approx(1e-3)


def test_text_that_spells_a_value_is_taken() -> None:
    """papermill hands over `true` as text."""
    assert launch.configure(recompute="true", steps="12").recompute is True  # type: ignore[arg-type]
    assert launch.configure(recompute="false").recompute is False  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"scale": "larg"}, "scale is 'larg'; it must be one of toy, small, nano, mini, large"),
        ({"scale": "large"}, "scale 'large' needs data and a tokenizer of 200,192 entries"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"seed": -1}, "seed is -1; it must be zero or more"),
        ({"balance": "sing"}, "method is 'sing'; it must be one of none, sign, smebu"),
        ({"balance_rate": -0.1}, "balance.rate is -0.1; it must be zero or more"),
        ({"top_k": 33}, r"top_k is 33; it must be from 1 to num_experts \(32\)"),
        ({"learning_rate": 0}, "learning_rate is 0.0; it must be above zero"),
        ({"micro_batches": 5}, "micro_batches is 5; it must be a divisor"),
        ({"recompute": "maybe"}, "recompute is 'maybe'; it must be true or false"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
    ],
)
def test_bad_parameters_are_one_sentence(parameters: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        launch.configure(**parameters)
    assert "\n" not in str(error.value)


def test_a_misspelt_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = InteractiveShell()
    shell.user_ns["In"] = ["", "steps = None", "# Parameters\nsteps = 3\nstpes = 3\n"]
    monkeypatch.setattr(launch, "get_ipython", lambda: shell)
    assert launch.injected() == ["steps", "stpes"]
    with pytest.raises(
        ValueError, match="no parameter 'stpes'; this notebook has scale, steps"
    ):
        launch.configure(steps=3)


def test_the_notebook_has_exactly_these_parameters() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (tagged,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = [line.split(":")[0] for line in "".join(tagged["source"]).splitlines()]
    assert names == list(inspect.signature(launch.configure).parameters)
