"""Every notebook at toy scale through papermill; assertions read the run files."""

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import xarray as xr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trinity_lib import audit, disk, findings, kernels_config, metrics, statements, study_config
from trinity_lib.record import open_run
from trinity_lib.train import RUNS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAIN = ROOT / "notebooks" / "train.ipynb"
KERNELS = ROOT / "notebooks" / "kernels.ipynb"
COLLAPSE = ROOT / "notebooks" / "collapse.ipynb"
TRUEBASE = ROOT / "notebooks" / "truebase.ipynb"
REFERENCE = ROOT / "runs" / "reference" / "collapse.nc"


def command(output: Path, notebook: Path = TRAIN, **parameters: object) -> list[str]:
    """The papermill call that the README shows."""
    words = [sys.executable, "-m", "papermill", str(notebook), str(output)]
    words += ["--no-progress-bar"]
    return words + [
        word for key, value in parameters.items() for word in ("-p", key, str(value))
    ]


def execute(output: Path, notebook: Path = TRAIN, **parameters: object) -> xr.DataTree:
    """Run a notebook as the README does, in a process of its own; return its run."""
    done = subprocess.run(
        command(output, notebook, **parameters),
        capture_output=True,
        text=True,
        cwd=output.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return open_run(printed_run_file(output))


def printed_run_file(output: Path) -> Path:
    """The path the notebook's last cell printed."""
    notebook = nbformat.read(output, as_version=4)
    text = "".join(o.get("text", "") for o in notebook.cells[-1].outputs)
    return Path(text.split("run file: ")[1].strip())


def name(tmp_path_factory: pytest.TempPathFactory, what: str) -> str:
    """A run name no other test session has taken."""
    return (
        f"test-{what}-{tmp_path_factory.getbasetemp().name}-{np.random.SeedSequence().entropy}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module", autouse=True)
def tidy(tmp_path_factory: pytest.TempPathFactory):
    """Leave `runs/` as it was; another process of the tests may write there too."""
    before, own = set(RUNS.iterdir()), tmp_path_factory.getbasetemp().name
    yield
    import shutil

    for path in set(RUNS.iterdir()) - before:
        if path.name.startswith("test-") and own in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def toy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    return execute(folder / "toy.ipynb", name=name(tmp_path_factory, "toy"))


def test_the_toy_learns(toy: xr.DataTree) -> None:
    assert toy.attrs["status"] == "complete"
    last = toy["evaluation"].isel(step=-1, split=0)
    gain = last["unigram_entropy"] - last["loss"]
    assert float(gain.sel(domain="code")) >= 1.3
    assert float(gain.sel(domain="prose")) >= 1.0
    for domain in ("code", "prose", "arithmetic", "facts"):
        row = last.sel(domain=domain)
        assert 0 < float(row["gzip_bits_per_byte"]) < 8 and int(row["bytes"]) > 4000
        bits = float(row["loss"] * row["tokens"] / row["bytes"] / np.log(2))
        assert float(row["bits_per_byte"]) == pytest.approx(bits)


def test_the_toy_keeps_its_experts(toy: xr.DataTree) -> None:
    assert float(metrics.dead_experts(toy).mean()) <= 0.1


def test_the_notebook_shows_every_figure_and_the_table(toy: xr.DataTree, folder: Path) -> None:
    shows(folder / "toy.ipynb", 7, ("gzip", "MaxVio", "BatchHet", "time-compressed"))


def shows(executed: Path, figures: int, words: tuple[str, ...]) -> None:
    """That many figures with something in them, those words, and nothing on stderr."""
    notebook = nbformat.read(executed, as_version=4)
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    images = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == figures and all(len(image) > 10_000 for image in images)
    text = json.dumps(outputs)
    for word in words:
        assert word in text
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]


def test_the_kernels_notebook_measures_every_backend(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """MegaBlocks too, in Triton's interpreter, whose time is not taken for its speed."""
    output = folder / "kernels.ipynb"
    begun = time.monotonic()
    run = execute(output, KERNELS, name=name(tmp_path_factory, "kernels"))
    assert time.monotonic() - begun < 60
    assert run.attrs["status"] == "complete"
    shows(output, 3, ("agrees", "megablocks", "MaxVio", "times as fast as torch"))
    smallest = run["agreement"]["error"].isel(tokens=0)
    assert smallest.backend.values.tolist() == ["torch", "native", "megablocks"]
    assert (smallest < 10 * run.attrs["epsilon"]).all()
    seconds = run["speed"]["seconds"]
    assert (seconds.sel(backend=["torch", "native"]) > 0).all()
    timed = seconds.sel(backend="megablocks").notnull()
    assert timed.all() if run.attrs["device"] == "cuda" else not timed.any()


def test_the_collapse_notebook_runs_every_part(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every balancer, one seed: nothing can be decided, and it says so."""
    output = folder / "collapse.ipynb"
    begun = time.monotonic()
    run = execute(output, COLLAPSE, name=name(tmp_path_factory, "collapse"))
    assert time.monotonic() - begun < 90  # a minute where no other test runs
    assert run.attrs["status"] == "complete"
    shows(output, 9, ("undecided", "SMEBU", "quantile balancing", "too few seeds"))
    rows = findings.of(run)
    assert set(rows["method"]) == {*study_config.STEPPED, *study_config.UNTUNED}
    assert set(rows["part"]) == {"grid", "causes", "anatomy", "rescue"}
    assert set(run["claims"]["verdict"].values) == {"undecided"}


def test_the_reference_study_is_drawn_from_its_file_alone(folder: Path) -> None:
    output = folder / "reference.ipynb"
    begun = time.monotonic()
    run = execute(output, COLLAPSE, source=REFERENCE)
    assert time.monotonic() - begun < 40  # 20 s where no other test runs
    shows(output, 9, ("supported", "SMEBU", "quantile balancing"))
    assert (int(run.attrs["num_experts"]), int(run.attrs["top_k"])) == (256, 4)
    stored = run["claims"].to_dataset()
    groups = [run[name].to_dataset() for name in ("trials", "results")]
    again = statements.claims(*({key: g[key].values for key in g} for g in groups))
    assert stored["verdict"].values.tolist() == again["verdict"]
    np.testing.assert_allclose(stored["estimate"], again["estimate"])


def test_a_chain_is_trained_audited_and_its_cards_hold(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The toy, whole: four stages, all audits, a card of each that knows its folder."""
    output = folder / "truebase.ipynb"
    run = execute(output, TRUEBASE, name=name(tmp_path_factory, "truebase"), workers=1)
    assert run.attrs["status"] == "complete"
    rows = run["findings"].to_dataset().to_dataframe()
    assert set(rows["of_stage"]) == {"truebase", "base", "instruct", "debiased"}
    assert set(audit.PRIMARY) <= set(rows["family"])
    item = "Pearson correlation with planted levels, held-out names"
    for stage in ("truebase", "base"):
        found = rows[(rows["of_stage"] == stage) & (rows["item"] == item)]
        assert found["estimate"].item() > 0.9
    printed = nbformat.read(output, as_version=4).cells[-1].outputs
    lines = "".join(o.get("text", "") for o in printed).splitlines()
    checks = [line.split()[1:] for line in lines if "card verify" in line]
    assert len(checks) == 4
    for words in checks:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("path", "function"),
    [(KERNELS, kernels_config.configure), (COLLAPSE, study_config.configure)],
    ids=["kernels", "collapse"],
)
def test_a_notebooks_parameters_are_the_functions(path: Path, function: Callable) -> None:
    inspected = papermill.inspect_notebook(str(path))
    given = {name: ast.literal_eval(each["default"]) for name, each in inspected.items()}
    asked = inspect.signature(function).parameters
    assert given == {name: each.default for name, each in asked.items()}


def test_same_parameters_same_bits_and_a_clean_nbdiff(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    same = name(tmp_path_factory, "same")  # names alike, as nbdiff pairs cells by likeness
    runs = [execute(folder / f"{i}.ipynb", steps=60, seed=3, name=f"{same}-{i}") for i in "ab"]
    for group, names in {
        "train": ("loss", "grad_norm"),
        "routing": ("count", "bias"),
        "evaluation": ("loss", "count"),
    }.items():
        for each in names:
            np.testing.assert_array_equal(runs[0][group][each], runs[1][group][each])
    nbdiff = [str(Path(sys.executable).parent / "nbdiff"), "--no-color"]
    paths = [str(folder / "a.ipynb"), str(folder / "b.ipynb")]
    shown = subprocess.run([*nbdiff, *paths], capture_output=True, text=True, cwd=ROOT).stdout
    headings = [line for line in shown.splitlines() if line.startswith("##")]
    assert headings
    for heading in headings:
        assert "outputs" in heading or "source" in heading, heading
    sources = subprocess.run(
        [*nbdiff, "-s", *paths], capture_output=True, text=True, cwd=ROOT
    ).stdout
    changed = [line for line in sources.splitlines() if line[:1] in "+-" and "  " in line]
    assert changed and all("name" in line for line in changed if "=" in line)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"notebook": KERNELS, "tokns": 3}, "there is no parameter 'tokns'"),
        ({"notebook": KERNELS, "tokens": "x"}, "tokens is 'x'; it must be a whole number"),
        ({"stpes": 3}, "there is no parameter 'stpes'"),
        ({"scale": "larg"}, "scale is 'larg'; it must be one of"),
        ({"recompute": "falsch"}, "recompute is 'falsch'; it must be true or false"),
        ({"data": "nowhere/*.txt"}, "data is 'nowhere/*.txt'; nothing is there"),
        ({"data": "latin.txt"}, "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
    ],
)
def test_bad_input_ends_in_one_sentence(folder: Path, parameters: dict, sentence: str) -> None:
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    output = folder / "bad.ipynb"
    done = subprocess.run(
        command(output, **parameters), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1  # papermill's own
    assert sentence in done.stderr.strip().splitlines()[-1]
    cells = nbformat.read(output, as_version=4).cells
    (red,) = [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]
    (line,) = red.traceback
    assert sentence in line and line == red.evalue


def test_a_users_text_and_tokenizer_train(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A folder of text, a JSONL and a Parquet, and a tokenizer.json of another project."""
    mine = folder / "mine"
    mine.mkdir()
    lines = [
        f"Line {i} of the story: the {i % 13} cats sat on {i * 3} mats." for i in range(600)
    ]
    for i in range(30):
        (mine / f"{i}.txt").write_text("\n".join(lines[20 * i : 20 * i + 20]))
    table = pd.DataFrame({"body": lines, "id": range(600)})
    table.to_parquet(folder / "table.parquet")
    table.to_json(folder / "lines.jsonl", orient="records", lines=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(lines, trainer)
    made.save(str(folder / "tokenizer.json"))
    run = execute(
        folder / "mine.ipynb",
        data="mine=2, table.parquet=1:2:1, lines.jsonl",
        text_field="body",
        tokenizer="tokenizer.json",
        steps=20,
        name=name(tmp_path_factory, "mine"),
    )
    last = run["evaluation"].isel(step=-1, split=0)
    assert last.domain.values.tolist() == ["mine", "table", "lines"]
    assert (last["loss"] < last["unigram_entropy"]).all()
    config = json.loads(run.attrs["config"])
    assert config["model"]["vocab_size"] == made.get_vocab_size()
    assert config["phases"][1]["mixture"] == {"mine": 2.0, "table": 2.0, "lines": 1.0}


def test_a_killed_notebook_resumes_to_the_bit(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SIGKILL to the kernel, as a machine without memory sends it; then `-p resume true`."""
    parameters = {"steps": 40, "checkpoint_every": 4, "seed": 5}
    whole = execute(folder / "w.ipynb", name=name(tmp_path_factory, "whole"), **parameters)
    killed = name(tmp_path_factory, "killed")
    output = folder / "k.ipynb"
    process = subprocess.Popen(
        command(output, name=killed, **parameters),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (RUNS / killed / "step-00000008").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for _ in range(100):  # the kernel leads a session of its own, and follows its parent
        if not disk.locked(RUNS / killed / "lock"):
            break
        time.sleep(0.1)
    assert open_run(RUNS / killed).attrs["status"] == "running"
    resumed = execute(output, name=killed, resume="true", **parameters)
    for group in ("train", "routing", "evaluation"):
        for each, values in whole[group].data_vars.items():
            if each != "seconds":
                np.testing.assert_array_equal(values, resumed[group][each])
    assert json.loads(resumed.attrs["resumed"])[0]["step"] >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_as_agreed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)
    (parameters,) = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    inspected = papermill.inspect_notebook(str(path))
    names = [line.split(":")[0] for line in parameters.source.splitlines()]
    assert names == list(inspected)
    for each in inspected.values():
        assert each["help"] and each["inferred_type_name"] != "None", each
        later = "".join(c.source for c in code if c is not parameters)
        assert f"{each['name']}=" in later, f"{each['name']} is read by no later cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_help_lists_every_parameter(path: Path) -> None:
    words = [sys.executable, "-m", "papermill", "--help-notebook", str(path)]
    shown = subprocess.run(words, capture_output=True, text=True).stdout
    assert ": int" in shown and "Unknown type" not in shown
    for each in papermill.inspect_notebook(str(path)).values():
        assert each["name"] in shown and each["help"].split()[0] in shown


@pytest.mark.slow
def test_without_a_balancer_routing_collapses(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """256 experts, top-4, 300 steps: at least 40% dead, five times as many as SMEBU's."""
    dead = {}
    for method in ("none", "smebu"):
        run = execute(
            folder / f"{method}.ipynb",
            num_experts=256,
            steps=300,
            balance=method,
            name=name(tmp_path_factory, method),
        )
        assert float(metrics.validation_load(run).mean()) >= 100
        dead[method] = float(metrics.dead_experts(run).mean())
    assert dead["none"] >= 0.4
    assert dead["none"] >= 5 * dead["smebu"]
