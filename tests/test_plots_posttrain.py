"""Figures and the reading of post-training, from numbers that are known."""

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from trinity_lib import plots_posttrain

MOMENTS, TASKS = ["start", "sft", "dpo"], ["facts", "preferences"]


@pytest.fixture
def run() -> xr.DataTree:
    """SFT and DPO, ten steps each, of a model with two MoE layers."""
    step = np.arange(1, 21)
    stage = np.repeat([0, 1], 10)
    nan = np.full(20, np.nan)
    posttrain = {
        "stage": stage,
        "loss": np.linspace(4, 1, 20),
        "accuracy": np.linspace(0, 1, 20),
        "margin": np.where(stage, np.linspace(-1, 2, 20), np.nan),
        "reward": nan,
        "kl": nan,
        "max_vio": np.linspace(1, 3, 20),
        "batch_tokens": np.full(20, 1000),
        "seconds": np.full(20, 0.5),
    }
    axes = {"step": step, "layer": [1, 2], "expert": np.arange(8)}
    accuracy = np.array([[0.1, 0.5], [0.2, 0.6], [0.9, 0.4]])
    words = np.array(["a", "b", "c"], dtype=object)
    groups = {
        "posttrain": xr.Dataset({k: ("step", v) for k, v in posttrain.items()}, {"step": step}),
        "layers": xr.Dataset({"max_vio": (("step", "layer"), np.ones((20, 2)))},
                             {k: axes[k] for k in ("step", "layer")}),
        "routing": xr.Dataset(
            {"bias": (("step", "layer", "expert"), np.zeros((20, 2, 8)))}, axes),
        "answers": xr.Dataset(
            {"accuracy": (("moment", "task"), accuracy),
             "formed": (("moment", "task"), np.array([[0.5, np.nan]] * 3)),
             "questions": ("task", [40, 60])},
            {"moment": MOMENTS, "task": TASKS}),
        "transcripts": xr.Dataset(
            {"subject": ("question", ["facts"] * 3), "asked": ("question", words),
             "wanted": ("question", words),
             "said": (("moment", "question"), np.tile(words, (3, 1)))},
            {"moment": MOMENTS, "question": np.arange(3)}),
    }  # fmt: skip
    tree = xr.DataTree.from_dict(groups)
    model = {"router": {"num_experts": 8, "top_k": 2}}
    tree.attrs = {
        "config": json.dumps({"init": "runs/x/base", "balance": {"method": "none"}}),
        "model": json.dumps(model), "stages": json.dumps(["sft", "dpo"]), "seed": 0,
        "status": "complete", "warnings": json.dumps(["2 of 9 examples are cut"]),
        "parameters_trained": 50, "parameters_total": 200,
    }  # fmt: skip
    return tree


def test_figures_say_what_they_show(run: xr.DataTree) -> None:
    learning = plots_posttrain.learning(run)
    assert [a.get_title() for a in learning.axes if a.get_title()] == [
        "SFT: 10 steps",
        "DPO: 10 steps",
    ]
    labels = " ".join(a.get_ylabel() for a in learning.axes)
    assert "cross entropy of answers, nat" in labels and "margin, nat" in labels
    answers = plots_posttrain.answers(run)
    right = answers.axes[0]
    heights = [bar.get_height() for bars in right.containers[::2] for bar in bars]
    assert sorted(h for h in heights if h) == pytest.approx([10, 20, 40, 50, 60, 90])
    assert "40 to 60 a task" in right.get_title()
    balance = plots_posttrain.balance(run)
    assert "balance: frozen" in balance.axes[0].get_title()
    names = [text.get_text() for text in balance.axes[0].texts]
    assert names == ["SFT", "DPO"]


def test_the_reading_is_of_the_run_s_numbers(run: xr.DataTree) -> None:
    text = plots_posttrain.reading(run)
    assert "SFT then DPO from runs/x/base, seed 0: 20 steps in 10 s" in text
    assert "50 of 200 parameters trained (25.0%)" in text
    assert "facts 10% to 90% (more)" in text
    assert "preferences 50% to 40% (no change beyond chance)" in text
    assert "MaxVio, mean over layers, was 1.47 in the first 10 steps and 2.53 in" in text
    assert "balance frozen: the selection biases moved by at most 0" in text
    assert "Warning: 2 of 9 examples are cut." in text


def test_tables_have_every_moment(run: xr.DataTree) -> None:
    marks = plots_posttrain.marks(run)
    assert marks.columns.tolist() == ["before", "SFT", "DPO"]
    assert marks.loc["facts", "DPO"] == "90% (77% to 96%)"  # Wilson's interval of 36 of 40
    said = plots_posttrain.said(run, each=2)
    assert len(said) == 2 and said.columns.tolist() == ["right", "before", "SFT", "DPO"]


def test_a_run_that_failed_early_can_be_drawn(run: xr.DataTree) -> None:
    run["answers"]["accuracy"][1:] = np.nan
    run["answers"]["formed"][1:] = np.nan
    for group in ("posttrain", "layers", "routing"):
        run[group] = run[group].to_dataset().isel(step=slice(0, 6))
    run.attrs["status"] = "failed"
    for draw in (plots_posttrain.learning, plots_posttrain.answers, plots_posttrain.balance):
        assert draw(run).axes
    text = plots_posttrain.reading(run)
    assert "DPO: not reached." in text and "The run is not complete: failed." in text
    assert plots_posttrain.marks(run).loc["facts", "DPO"] == ""


def test_reading_a_run_needs_no_torch() -> None:
    code = "import sys, trinity_lib.plots_posttrain; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
