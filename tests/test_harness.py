"""lm_eval on a checkpoint: our model class gives what transformers' gives, item by item."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from trinity_lib import hub, plugin, tokenizer
from trinity_lib.config import BadValue, Missing, override
from trinity_lib.run import RunConfig
from trinity_lib.train import train

pytest.importorskip("lm_eval")
TASKS = Path(hub.__file__).parent / "tasks"
NAMES = ("trinity_facts", "trinity_arithmetic", "trinity_code")


@pytest.fixture(scope="module")
def folder(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The base of a run long enough for its answers to differ."""
    runs = tmp_path_factory.mktemp("runs")
    train(override(tiny, {"name": "run"}), runs=runs, cache=cache)
    return runs / "run" / "base"


def evaluate(arguments: str, output: Path, *more: str) -> subprocess.CompletedProcess:
    """The lm_eval command, without a network."""
    command = [str(Path(sys.executable).parent / "lm_eval"), *more, "--log_samples"]
    command += ["--model_args", arguments, "--output_path", str(output), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)


def scores(output: Path) -> dict[str, dict]:
    (file,) = output.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {
        task: {k: v for k, v in each.items() if isinstance(v, float)}
        for task, each in results.items()
    }


def answers(output: Path, task: str) -> list:
    """Every item's responses, in order."""
    (file,) = output.rglob(f"samples_{task}_*.jsonl")
    items = sorted(map(json.loads, file.read_text().splitlines()), key=lambda i: i["doc_id"])
    return [item["resps"] for item in items]


def test_our_plugin_and_transformers_give_identical_scores(
    folder: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    lines = [f"37 + {i} = {37 + i}, and Ada was born in Rome." for i in range(12)]
    (tasks / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (tasks / "rolling.yaml").write_text(
        "task: own_rolling\ndataset_path: json\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks / 'text.jsonl'}\n"
        'test_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    results = {}
    for model, arguments in (
        ("trinity", f"path={folder}"),
        ("hf", f"pretrained={folder},dtype=float32"),
    ):
        asked = ["--tasks", ",".join((*NAMES, "own_rolling")), "--include_path", str(tasks)]
        done = evaluate(arguments, tmp_path / model, "--model", model, *asked)
        assert done.returncode == 0, done.stderr[-3000:]
        results[model] = scores(tmp_path / model)
    ours, theirs = results["trinity"], results["hf"]
    assert set(ours) == {*NAMES, "own_rolling"}
    bits = [each.pop("own_rolling") for each in (ours, theirs)]
    assert ours == theirs
    assert bits[0]["bits_per_byte,none"] == pytest.approx(bits[1]["bits_per_byte,none"], 1e-6)
    assert 0 < ours["trinity_code"]["acc,none"] < 1
    for task in NAMES:
        pairs = zip(
            answers(tmp_path / "trinity", task), answers(tmp_path / "hf", task), strict=True
        )
        for mine, other in pairs:
            compare(mine, other)


def compare(mine: list, other: list) -> None:
    """Texts are equal; log-likelihoods agree to 1e-4, and both or neither are greedy."""
    assert len(mine) == len(other)
    for first, second in zip(mine, other, strict=True):
        for one, two in zip(first, second, strict=True):
            if isinstance(one, str):
                assert one == two
            else:
                assert float(one[0]) == pytest.approx(float(two[0]), abs=1e-4)
                assert one[1] == two[1]


def test_long_texts_are_scored_in_windows_and_cut_from_the_left(folder: Path) -> None:
    from trinity_lib.harness import TrinityLM

    model = TrinityLM(str(folder), max_length=16)
    tokens = [*range(10, 50)]
    (whole,) = model._loglikelihood_tokens([(None, tokens[:-3], tokens[-3:])])
    exact = hub.load(folder)
    with torch.no_grad():
        logits = exact(torch.tensor([tokens[-17:-1]])).logits[0, -3:].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(tokens[-3:]).unsqueeze(1)).sum()
    assert whole[0] == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(BadValue, match="max_length is 16; it must be at least 20"):
        model._loglikelihood_tokens([(None, [1], tokens[:20])])


@pytest.mark.parametrize("sentence", ["has no end mark", "it must be a torch dtype"])
def test_what_cannot_be_evaluated_is_one_sentence(
    folder: Path, tmp_path: Path, sentence: str
) -> None:
    from trinity_lib.harness import TrinityLM

    if "dtype" in sentence:
        with pytest.raises(BadValue, match=sentence):
            TrinityLM(str(folder), dtype="float33")
        return
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    settings = {"bos_token": None, "eos_token": None}
    (copied / tokenizer.SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(BadValue, match=sentence):
        TrinityLM(str(copied))
    with pytest.raises(Missing, match="there is no such file"):
        (copied / "tokenizer.json").unlink()
        TrinityLM(str(copied))


def test_the_plugin_is_one_line_that_can_be_taken_back(monkeypatch, tmp_path: Path) -> None:
    installed = Path(sysconfig.get_path("purelib")) / "trinity_lm_eval.pth"
    assert installed.read_text() == plugin.LINE, "run `make plugin`"
    monkeypatch.setattr(plugin.sysconfig, "get_path", lambda name: str(tmp_path))
    plugin.install()
    assert (tmp_path / "trinity_lm_eval.pth").read_text().count("\n") == 1
    plugin.remove()
    assert not list(tmp_path.iterdir())
    code = (
        "import lm_eval.api.registry as r; r.get_model('dummy'); "
        "print('trinity' in r.model_registry)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.strip() == "True"


def test_tasks_ask_what_training_never_said(tmp_path: Path) -> None:
    sys.path.insert(0, str(TASKS))
    try:
        import generators
    finally:
        sys.path.remove(str(TASKS))
    from trinity_lib import corpus, world

    facts = generators.facts()["test"]
    known = {text for text in corpus.procedural(0).documents["train"]["facts"]}
    assert len(facts) == 100 and len(set(facts["question"])) == 100
    assert not [q for q in facts["question"] if any(q in text for text in known)]
    for item in facts:
        assert len(set(item["choices"])) == 4
    for item in generators.arithmetic()["test"]:
        *solved, asked = item["question"].splitlines()
        a, sign, b = asked.removesuffix(" =").split(" ")
        result = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
        assert int(item["answer"]) == result
        assert world.in_validation(int(a), sign, int(b)) and len(solved) == 3
    code = generators.code()["test"]
    assert len(code) == 100 and all(len(set(choices)) == 4 for choices in code["choices"])
    assert generators.code()["test"].to_list() == code.to_list()
