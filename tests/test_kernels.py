"""Measuring the expert backends: what is measured, what is refused, what is written down."""

import dataclasses
import json
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from tests.test_experts import by_loop
from trinity_lib import (
    agreement,
    experts,
    interpreted,
    kernels,
    kernels_config,
    loads,
    plots_kernels,
)
from trinity_lib.agreement import QUANTITIES, ROUTINGS, Results
from trinity_lib.config import BadValue, Taken, from_json, to_json
from trinity_lib.experts import Experts
from trinity_lib.kernels_config import KernelsConfig, configure
from trinity_lib.record import open_run, open_runs
from trinity_lib.routing import Routing
from trinity_lib.schema import TABLES

TINY = KernelsConfig(
    shape="tiny",
    width=16,
    expert_width=12,
    num_experts=6,
    top_k=2,
    tokens=(3, 40),
    backends=("torch", "native"),
    repetitions=2,
    name="run",
)


def layer(dtype: torch.dtype = torch.float32, seed: int = 0) -> Experts:
    return agreement.layer(6, 16, 12, seed, "cpu", dtype)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """All three backends, MegaBlocks in its own process."""
    every = dataclasses.replace(TINY, backends=("torch", "native", "megablocks"))
    return kernels.measure(every, runs=tmp_path_factory.mktemp("runs"))


# What float64 says


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_reference_is_a_loop_over_tokens(routing: str) -> None:
    module = layer(torch.float64)
    given = agreement.batch(module, 17, 2, routing, 0)
    x, weights = (t.double().requires_grad_() for t in (given.x_TD, given.weights_TK))
    y = by_loop(module, x, Routing(x, given.experts_TK, weights))
    leaves = (x, weights, *module.parameters())
    grads = torch.autograd.grad(y, leaves, given.dy_TD, materialize_grads=True)
    found = agreement.errors(module, given, {"loop": Results(y.detach(), *grads)})["loop"]
    assert list(found) == list(QUANTITIES)
    assert max(found.values()) < 1e-14


def planted(module: Experts, given: agreement.Batch, change: Any) -> dict[str, float]:
    """Errors of the torch backend in float64, changed in one place."""
    right = agreement.compute(module, given, "torch")
    return agreement.errors(module, given, {"it": change(right)})["it"]


@pytest.mark.parametrize(
    ("field", "quantity"),
    list(zip(("y_TD", "dx_TD", "dweights_TK"), QUANTITIES, strict=False))
    + [(name, QUANTITIES[3]) for name in ("dgate_EFD", "dup_EFD", "ddown_EFD")],
)
def test_a_wrong_value_shows_where_it_is(field: str, quantity: str) -> None:
    module = layer(torch.float64)
    given = agreement.batch(module, 17, 2, "random", 0)
    found = planted(
        module, given, lambda r: r._replace(**{field: getattr(r, field) * (1 + 1e-3)})
    )
    for name, error in found.items():
        if name == quantity:
            joint = field.endswith("EFD")  # one of three weights' gradients
            assert 1e-4 < error < 1e-3 if joint else error == pytest.approx(1e-3, rel=1e-3)
        else:  # a routing weight's gradient is fp32, as the weight is
            assert error < 2e-7


def test_an_idle_experts_gradient_counts_and_nan_is_infinite() -> None:
    module = layer(torch.float64)
    given = agreement.batch(module, 1, 2, "random", 0)
    idle = next(e for e in range(6) if not (given.experts_TK == e).any())

    def put(result: Results, value: float) -> Results:
        wrong = result.dup_EFD.clone()
        wrong[idle, 0, 0] = value
        return result._replace(dup_EFD=wrong)

    assert planted(module, given, lambda r: put(r, 1.0))[QUANTITIES[3]] > 1e-2
    assert planted(module, given, lambda r: put(r, float("nan")))[QUANTITIES[3]] == np.inf


def test_routings_are_what_they_are_called() -> None:
    module = agreement.layer(32, 8, 4, 0, "cpu", torch.float32)
    vio = {}
    for routing in ROUTINGS:
        given = agreement.batch(module, 256, 4, routing, 0)
        assert all(len(set(row)) == 4 for row in given.experts_TK.tolist())
        torch.testing.assert_close(given.weights_TK.sum(1), torch.ones(256))
        vio[routing] = loads.max_vio(given.experts_TK.flatten().bincount(minlength=32))
    assert vio["balanced"] == 0 < vio["random"] < 1
    assert 0.9 * 8 < vio["collapsed"] + 1 <= 8  # all on 4 of 32 is 8 times the mean


# The run


def test_every_group_is_the_schemas(run: xr.DataTree) -> None:
    assert run.attrs["status"] == "complete" and run.attrs["scale"] == "tiny"
    for group in kernels.GROUPS:
        variables = TABLES[group]
        assert set(run[group].data_vars) == set(variables)
        for name, variable in variables.items():
            array = run[group][name]
            assert array.dims == variable.dims and array.dtype == variable.dtype
            assert array.attrs["units"] == variable.units and array.attrs["long_name"]
    assert json.loads(run.attrs["experts_backend"])["native"] == "compiled"
    assert json.loads(run.attrs["versions"])["torch"] == torch.__version__
    assert from_json(KernelsConfig, run.attrs["config"]).tokens == (3, 40)


def test_every_backend_agrees(run: xr.DataTree) -> None:
    error = run["agreement"]["error"]
    assert error.notnull().all() and (error > 0).all()
    assert (error < plots_kernels.LIMITS["float32"] * run.attrs["epsilon"]).all()


def test_megablocks_computes_but_is_not_timed(run: xr.DataTree) -> None:
    seconds = run["speed"]["seconds"]
    assert seconds.sel(backend="megablocks").isnull().all()
    assert (seconds.sel(backend=["torch", "native"]) > 0).all()
    assert "interpreted" in json.loads(run.attrs["not_timed"])["megablocks"]
    inside = json.loads(run.attrs["interpreted_backend"])
    assert inside["backend"] == "megablocks"
    assert inside["megablocks_kernels"] == "interpreted Triton"
    assert json.loads(run.attrs["not_measured"]) == {}


def test_operations_are_counted(run: xr.DataTree) -> None:
    flops = run["speed"]["flops"]
    forward = 6 * 16 * 12 * 2 * 40
    assert flops.sel(tokens=40).values.tolist() == [forward, 3 * forward]
    assert (run["speed"]["dense_rate"] > 1e8).all()


def test_figures_and_reading_take_the_run(run: xr.DataTree) -> None:
    for plot in (plots_kernels.agreement, plots_kernels.speed, plots_kernels.share):
        assert plot(run).axes
    text = plots_kernels.reading(run)
    assert "megablocks, up to 40 tokens" in text and "does not agree" not in text


def test_the_same_seed_gives_the_same_bits(run: xr.DataTree, tmp_path: Path) -> None:
    again = kernels.measure(TINY, runs=tmp_path)
    both = again["agreement"]["error"].backend.values
    np.testing.assert_array_equal(
        again["agreement"]["error"], run["agreement"]["error"].sel(backend=both)
    )
    other = kernels.measure(dataclasses.replace(TINY, seed=1, name="other"), runs=tmp_path)
    assert (other["agreement"]["error"] != again["agreement"]["error"]).any()
    joined = open_runs(str(tmp_path / "*.nc"), "speed")
    assert joined.run.values.tolist() == ["other", "run"]


def test_global_generators_and_threads_are_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    kernels.measure(dataclasses.replace(TINY, threads=2), runs=tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.get_num_threads() == before[2]


def test_a_wrong_backend_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Experts.forward

    def wrong(self: Experts, x: Tensor, routing: Routing) -> Tensor:
        y = right(self, x, routing)
        return y * 1.001 if self.backend == "native" else y

    monkeypatch.setattr(Experts, "forward", wrong)
    found = kernels.measure(TINY, runs=tmp_path)
    error = found["agreement"]["error"]
    np.testing.assert_allclose(error.sel(backend="native"), 1e-3, rtol=2e-3)
    assert (error.sel(backend="torch") < 1e-6).all()
    verdicts = plots_kernels.agreement_table(found)["verdict"]
    assert verdicts.tolist() == ["agrees", "does not agree"]


def test_a_missing_backend_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_native", lambda: "no C++ compiler")
    found = kernels.measure(TINY, runs=tmp_path)
    assert json.loads(found.attrs["not_measured"]) == {"native": "no C++ compiler"}
    assert found["agreement"]["error"].sel(backend="native").isnull().all()
    assert found["speed"]["seconds"].sel(backend="native").isnull().all()
    assert "Not measured: native, because no C++ compiler." in plots_kernels.reading(found)


@pytest.mark.parametrize(
    ("changes", "done", "reason"),
    [
        ({"tokens": (300,)}, None, "take at most 256 tokens here"),
        ({}, (1, "", "Traceback\nboom\n"), "its process ended with 1: boom"),
        ({}, (-9, "", ""), "its process ended with -9: no message"),
    ],
)
def test_why_megablocks_was_not_interpreted_is_written_down(
    changes: dict, done: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if done:
        result = SimpleNamespace(
            **dict(zip(("returncode", "stdout", "stderr"), done, strict=True))
        )
        monkeypatch.setattr(interpreted, "_run", lambda *_: result)
    config = dataclasses.replace(TINY, backends=("torch", "megablocks"), **changes)
    found = kernels.measure(config, runs=tmp_path)
    assert found.attrs["status"] == "complete"
    assert reason in json.loads(found.attrs["not_measured"])["megablocks"]


def test_a_run_that_is_cut_off_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = agreement.errors

    def fails(module: Experts, given: agreement.Batch, results: dict) -> dict:
        if len(given.x_TD) == 40:
            raise RuntimeError("out of memory")
        return real(module, given, results)

    monkeypatch.setattr(agreement, "errors", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.measure(TINY, runs=tmp_path)
    left = open_run(tmp_path / "run")
    assert left.attrs["status"] == "failed"
    assert left.attrs["reason"] == "RuntimeError: out of memory"
    assert left["agreement"]["error"].sel(tokens=3).notnull().all()
    assert left["agreement"]["error"].sel(tokens=40).isnull().all()


def test_a_name_is_taken_once_and_made_where_there_is_none(tmp_path: Path) -> None:
    kernels.measure(TINY, runs=tmp_path)
    with pytest.raises(Taken, match="'run' is complete"):
        kernels.measure(TINY, runs=tmp_path)
    made = kernels.measure(dataclasses.replace(TINY, name=""), runs=tmp_path)
    assert made.attrs["name"].startswith("kernels-tiny-")
    assert (tmp_path / f"{made.attrs['name']}.nc").exists()


def test_the_command_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "config.json"
    file.write_text(to_json(TINY))
    monkeypatch.setattr(
        sys, "argv", ["kernels", "--config", str(file), "--runs", str(tmp_path)]
    )
    kernels.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "run.nc")
    monkeypatch.setattr(sys, "argv", ["kernels", "--config", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "none.json; it cannot be read" in capsys.readouterr().err


# Parameters


def test_empty_parameters_suit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    assert (config.shape, config.tokens, config.device) == ("toy", (32, 256, 1024), "cpu")
    assert (config.width, config.expert_width) == (64, 32)
    assert (config.num_experts, config.top_k, config.threads) == (32, 4, 1)
    assert configure(shape="small").threads == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels_config, "memory", lambda device: (10**12, "GPU memory"))
    config = configure()
    assert (config.shape, config.device, config.dtype) == ("mini", "cuda", torch.bfloat16)
    assert config.tokens == (1024, 8192, 32_768)


def test_tokens_are_text_a_number_or_a_list() -> None:
    for given in ("64, 128", "[64,128]", [64, 128]):
        assert configure(tokens=given).tokens == (64, 128)  # type: ignore[arg-type]
    assert configure(tokens="128, 64").tokens == (64, 128)
    assert configure(tokens=64).tokens == (64,)  # type: ignore[arg-type]
    assert configure(backends="native,torch").backends == ("native", "torch")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"shape": "larg"}, "shape is 'larg'; it must be one of toy, small,"),
        ({"tokens": "many"}, "tokens is 'many'; it must be a whole number"),
        ({"tokens": "64, 0"}, "tokens is '0, 64'; it must be numbers from 1 to 10,000,000"),
        ({"tokens": "64, 64"}, "tokens is '64, 64'; it must be named once each"),
        ({"tokens": 2.5}, "tokens is 2.5; it must be a whole number"),
        ({"backends": "torch, cuda"}, "backends is 'cuda'; it must be one of torch, native,"),
        ({"backends": "native"}, "backends is 'native'; it must be a list with torch in it"),
        ({"backends": ""}, "backends is ''; it must be a list with torch in it"),
        ({"backends": "torch, torch"}, "backends is 'torch, torch'; it must be named once"),
        ({"repetitions": 1}, "repetitions is 1; it must be from 2"),
        ({"repetitions": "few"}, "repetitions is 'few'; it must be a whole number"),
        ({"seed": -1}, "seed is -1; it must be zero or more"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
        ({"device": "cuda"}, "device is 'cuda'; it must be cpu: this machine has no CUDA GPU"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"name": "a/b"}, "name is 'a/b'; it must be a file name without slashes"),
    ],
)
def test_bad_parameters_are_one_sentence(parameters: dict, sentence: str) -> None:
    if parameters.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(BadValue) as refused:
        configure(**parameters)
    assert sentence in str(refused.value)
    assert str(refused.value).count(". ") == 0 and str(refused.value).endswith(".")


def test_a_layer_that_memory_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_config, "memory", lambda device: (30 * 10**9, "memory"))
    with pytest.raises(BadValue, match=r"shape 'large' with 1,024 tokens needs 117 GB"):
        configure(shape="large")


def test_the_other_process_says_why_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(to_json(TINY)))
    with pytest.raises(SystemExit):
        interpreted.main()
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
