"""The audit card: it knows its folder, it knows itself, and it claims nothing."""

import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from trinity_lib import (
    audited,
    card,
    card_html,
    checkpoint,
    headings,
    hub,
    record,
    tokenizer,
)
from trinity_lib.checkpoint import State
from trinity_lib.config import BadValue, Missing
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.subject import Finding

NAN = float("nan")
WHEN = "2026-11-24T12:00:00+00:00"


def finding(family: str = "recall", item: str = "4 exposures", **changes: Any) -> Finding:
    plain = Finding(family, item, "share of 1", NAN, 0.5, 0.4, 0.6, 0.1, 40)
    return plain._replace(**changes)


FINDINGS = {
    "TrueBase": [
        finding(),
        finding("association", "baker", measure="log-odds, nat", truth=1.0, estimate=0.9,
                low=0.7, high=1.2, chance=0.0),
        finding("memorisation", "1 copy", estimate=0.0, low=-0.2, high=0.3, chance=0.0),
    ],
    "Instruct": [finding(estimate=float("inf"), high=float("inf"))],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> Path:
    """A training checkpoint with released weights, a tokenizer and what resuming needs."""
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("card") / "truebase"
    state = State({"step": 7}, {"momentum": torch.arange(4.0)})
    vocabulary = tokenizer.train(["some text"] * 3, 258)
    checkpoint.save(folder, model, vocabulary, '{"seed": 3}', state)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "truebase")
    return tmp_path / "truebase"


def made(folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "stage": "TrueBase", "data": {"world": "ab" * 32}, "seeds": {"audit": 1},
        "limitations": ["A toy."], "not_asked": {"toxicity": "no text of the kind was trained"},
        "created_at": WHEN,
    }  # fmt: skip
    run = {"seed": 3, "name": "toy", "git_dirty": 1, "versions": '{"torch": "2.13.0"}',
           "config_sha256": "x", "corpus_sha256": "cd" * 32}  # fmt: skip
    return card.build(FINDINGS, folder, run, **{**settings, **changes})


def test_a_card_comes_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    built = made(folder)
    path = card.write(built, tmp_path / "cards")
    assert card.read(path) == built and card.verify(built, folder) == []
    text = path.read_text()
    again = card.write(made(folder), tmp_path / "again").read_text()
    assert text == again and text.isascii()
    assert "does not claim" in text.splitlines()[1]
    assert "NaN" not in text and "Infinity" not in text
    assert built["data"] == {"world": "ab" * 32, "corpus": "cd" * 32}
    assert built["seeds"] == {"training": 3, "audit": 1}
    assert built["run"]["git_dirty"] is True and built["run"]["versions"] == {"torch": "2.13.0"}


def test_findings_stand_beside_their_truth(folder: Path) -> None:
    rows = made(folder)["findings"]
    assert [row["stage"] for row in rows] == ["TrueBase"] * 3 + ["Instruct"]
    assert rows[0]["truth"] is None and rows[0]["recovered"] is None
    assert rows[1]["recovered"] is True and rows[1]["at_chance"] is False
    assert rows[2]["at_chance"] is True
    assert rows[3]["estimate"] == "infinity" and rows[3]["units"] == 40


def test_what_an_audit_did_not_ask_is_no_figure(folder: Path) -> None:
    findings = {
        "TrueBase": [
            finding(),
            Finding("refusal", "not asked", "it has no chat template", *[math.nan] * 5, 0),
        ]
    }
    built = card.build(
        findings, folder, {}, stage="TrueBase", not_asked={"toxicity": "no text"}
    )
    assert [row["family"] for row in built["findings"]] == ["recall"]
    expected = {"refusal, TrueBase": "it has no chat template", "toxicity": "no text"}
    assert built["not-asked"] == expected and "refusal" not in built["evidence"]


def test_hashes_are_those_of_the_checkpoint(folder: Path) -> None:
    built = made(folder)["checkpoint"]
    assert built["weights"] == checkpoint.sha256(folder)
    roles = {name: about["role"] for name, about in built["files"].items()}
    assert roles == {
        "config.json": "configuration", "run_config.json": "configuration",
        "model.safetensors": "weights", "tokenizer.json": "tokenizer",
        "tokenizer_config.json": "tokenizer", "state.safetensors": "training state",
        "state.json": "training state", "manifest.json": "training state",
    }  # fmt: skip
    told = checkpoint.described(folder / "model.safetensors")
    assert {k: built["files"]["model.safetensors"][k] for k in told} == told


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def move(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def add(name: str) -> Callable[[Path], object]:
    def adding(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    return adding


TAMPERED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a byte in the middle of a tensor": (
        lambda f: flip(f / "model.safetensors"),
        ["model.safetensors has changed: as many bytes, another SHA-256."],
    ),
    "the last byte": (
        lambda f: flip(f / "model.safetensors", 0.9999999),
        ["model.safetensors has changed: as many bytes, another SHA-256."],
    ),
    "a byte more": (
        lambda f: longer(f / "tokenizer.json"),
        ["tokenizer.json has changed: it has"],
    ),
    "weights gone": (
        lambda f: (f / "model.safetensors").unlink(), ["model.safetensors is missing."]
    ),
    "weights renamed": (
        move, ["model.safetensors is missing.", "model-1.safetensors was not there"]
    ),
    "another shard": (add("model-00002.safetensors"), ["model-00002.safetensors was"]),
    "a shard in a folder": (add("shards/x.safetensors"), ["shards/x.safetensors was"]),
    "another tokenizer": (add("tokenizer.model"), ["tokenizer.model was not there"]),
    "a program": (add("modeling_afmoe.py"), ["modeling_afmoe.py was not there"]),
    "an adapter": (add("adapter_config.json"), ["adapter_config.json was not there"]),
    "a chat template": (add("chat_template.jinja"), ["chat_template.jinja was not there"]),
    "the configuration": (
        lambda f: flip(f / "config.json"), ["config.json has changed: as many bytes"]
    ),
    "the training state": (
        lambda f: flip(f / "state.safetensors"), ["state.safetensors has changed"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_a_folder_that_was_tampered_with_is_named(how: str, folder: Path) -> None:
    tamper, expected = TAMPERED[how]
    built = made(folder)
    tamper(folder)
    problems = card.verify(built, folder)
    assert len(problems) == len(expected)
    assert all(p.startswith(e) for p, e in zip(problems, expected, strict=True)), problems


def test_documentation_and_the_card_itself_may_be_added(folder: Path) -> None:
    built = made(folder)
    card.write(built, folder)
    for name in ("README.md", "LICENSE", ".gitattributes", "figure.png"):
        (folder / name).write_text("read me")
    add(".cache/huggingface.json")(folder)
    assert card.verify(built, folder) == [] and made(folder) == built


def test_shards_are_the_weights_where_there_are_no_others(folder: Path) -> None:
    (folder / "shards").mkdir()
    add("shards/shard-00001-of-00001.safetensors")(folder)
    part = "shards/shard-00001-of-00001.safetensors"
    assert made(folder)["checkpoint"]["files"][part]["role"] == "training state"
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    built = made(folder)
    assert built["checkpoint"]["files"][part]["role"] == "weights"
    assert built["configuration"] == {"file": "run_config.json", "content": {"seed": 3}}
    flip(folder / part)
    assert card.verify(built, folder) == [
        f"{part} has changed: as many bytes, another SHA-256."
    ]


def test_any_released_checkpoint_can_have_a_card(
    tiny_model: ModelConfig, tmp_path: Path
) -> None:
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(0))
    hub.save(model, tmp_path / "a", shard_bytes=100_000)
    built = card.build({"given": []}, tmp_path / "a", {}, stage="given")
    assert built["checkpoint"]["weights"] == checkpoint.sha256(tmp_path / "a")
    assert built["checkpoint"]["tokenizer"] == "" and built["run"] == {}
    assert not {"tokenizer", "run", "findings", "data", "truth"} & set(built["evidence"])
    assert card.verify(built, tmp_path / "a") == []
    (tmp_path / "a/model.safetensors.index.json").unlink()
    assert card.verify(built, tmp_path / "a") == ["model.safetensors.index.json is missing."]
    card_html.page(built)
    card.summary(built)


def test_large_files_are_read_as_streams(tmp_path: Path) -> None:
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(192 * 2**20)
    (tmp_path / "config.json").write_text("{}")
    tracemalloc.start()
    told = audited.describe(tmp_path)
    same = audited.differences(told, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same == [] and peak < 8 * 2**20


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_edited_card_is_refused(folder: Path, tmp_path: Path) -> None:
    path = card.write(made(folder), tmp_path)
    original = path.read_text()
    edited(path, lambda c: None)  # another layout alone
    card.read(path)
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda c: c["findings"][1].update(estimate=0.0),
        lambda c: c["checkpoint"]["files"].pop("tokenizer.json"),
        lambda c: c["limitations"].clear(),
        lambda c: c.update(digest="0" * 64),
        lambda c: c.update(more=1),
    ]
    for change in changes:
        path.write_text(original)
        edited(path, change)
        with pytest.raises(BadValue, match="has been edited since it was written"):
            card.read(path)
    path.write_text(original)
    edited(path, lambda c: c.pop("digest"))
    with pytest.raises(BadValue, match="is damaged: 'digest'"):
        card.read(path)
    path.write_text('{"stage": "Base",' + original[1:])
    with pytest.raises(BadValue, match="the key 'stage' comes twice"):
        card.read(path)


def test_another_schema_is_named_before_anything_else(folder: Path, tmp_path: Path) -> None:
    old = made(folder) | {"schema": 0}
    old["digest"] = card.digest(old)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(old))
    with pytest.raises(BadValue, match="has schema 0; this version reads 1"):
        card.read(path)


def test_what_is_no_card_and_no_folder_is_said_in_a_sentence(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Missing, match="There is no card"):
        card.read(tmp_path / "nothing.json")
    with pytest.raises(Missing, match="There is no card"):
        card.read(tmp_path)
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(BadValue, match="is not JSON"):
        card.read(tmp_path / "text.json")
    (tmp_path / "text.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadValue, match="is not JSON"):
        card.read(tmp_path / "text.json")
    for other in ("[]", "{}", '{"format": "another"}'):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(BadValue, match="is not an audit card"):
            card.read(tmp_path / "other.json")
    built = made(folder)
    with pytest.raises(Missing, match="There is no folder"):
        card.verify(built, tmp_path / "nowhere")
    with pytest.raises(Missing, match="There is no folder"):
        made(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadValue, match="holds no weights"):
        made(tmp_path / "empty")
    with pytest.raises(BadValue, match="stage is 'Base'; it must be one of TrueBase, Instruct"):
        made(folder, stage="Base")
    with pytest.raises(Missing, match="cannot be read"):
        made(folder, records={"run": tmp_path / "gone.nc"})
    (folder / "config.json").write_text("[")
    with pytest.raises(BadValue, match="config.json is not JSON"):
        made(folder)
    (folder / "config.json").unlink()
    (folder / "run_config.json").unlink()
    with pytest.raises(Missing, match="it has no config.json"):
        made(folder)


def test_a_linked_folder_is_refused_and_a_linked_file_is_read(folder: Path) -> None:
    built = made(folder)
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")  # as the hub's cache does
    assert card.verify(built, folder) == []
    (folder.parent / "blob").unlink()
    assert card.verify(built, folder) == ["model.safetensors is missing."]
    (folder / "shards").symlink_to(folder.parent, target_is_directory=True)
    with pytest.raises(BadValue, match="is a link to a folder"):
        card.verify(built, folder)


class Page(HTMLParser):
    """Collects what a page would load, its anchors and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.loads += [n for n in given if n in ("src", "srcset", "data", "action", "poster")]
        self.loads += [n for n in given if n.startswith("on")]
        if "href" in given:
            self.targets.append(given["href"] or "")
        if "id" in given:
            self.ids.append(given["id"] or "")


def test_the_page_loads_nothing_and_leads_nowhere_outside(folder: Path) -> None:
    built = made(folder)
    text = card_html.page(built)
    page = Page(text)
    assert page.loads == [] and not {"script", "link", "img", "iframe", "base"} & page.tags
    assert "url(" not in text and "@import" not in text and "://" not in text
    assert all(target.startswith("#") for target in page.targets)
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "at chance" in text and "does not claim" in text[: text.index("<h2")]
    for each in built["checkpoint"]["files"].values():
        assert each["sha256"] in text


def test_the_page_escapes_what_it_shows(folder: Path) -> None:
    bad = '<script>alert("x")</script>&'
    findings = {bad: [finding(bad, bad, measure=bad)]}
    built = card.build(
        findings, folder, {"name": bad, "seed": 0}, stage=bad, data={bad: bad}, seeds={bad: 1},
        limitations=[bad], not_asked={bad: bad}, records={bad: folder / "config.json"},
        created_at=bad,
    )  # fmt: skip
    text = card_html.page(built)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "script" not in Page(text).tags


def test_every_heading_is_listed_with_its_evidence_or_without(folder: Path) -> None:
    built = made(folder)
    by = {f["name"]: {h["id"]: h for h in f["headings"]} for f in built["frameworks"]}
    nist, sr, annex = by["NIST AI RMF 1.0"], by["SR 11-7"], by["EU AI Act, Annex IV"]
    counts = {
        name: sum(id.startswith(name) for id in nist)
        for name in ("GOVERN", "MAP", "MEASURE", "MANAGE")
    }
    assert counts == {"GOVERN": 19, "MAP": 18, "MEASURE": 22, "MANAGE": 13}
    assert nist["MEASURE 2.11"]["evidence"] == ["association"]
    assert nist["MEASURE 2.10"]["evidence"] == ["memorisation"]
    assert nist["GOVERN 2.1"]["evidence"] == [] and nist["MEASURE 2.6"]["evidence"] == []
    assert sr["V.3"]["evidence"] == ["association", "recall"]
    assert annex["2(d)"]["evidence"] == ["data"] and annex["8"]["evidence"] == []
    assert [f"{p}({c})" for p in "12" for c in "abcdefgh"] == [i for i in annex if "(" in i]
    named = {n for f in headings.FRAMEWORKS for h in f.headings for n in h.evidence}
    assert named <= set(headings.SECTIONS) | set(headings.FAMILIES)
    assert set(headings.SECTIONS) <= named
    for framework in built["frameworks"]:
        for heading in framework["headings"]:
            assert set(heading["evidence"]) <= set(built["evidence"])
            assert heading["wording"] in card_html.page(built).replace("&#x27;", "'")


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "trinity_lib.card", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    built = made(folder, records={"config": folder / "config.json"})
    path = card.write(built, tmp_path / "cards")
    passed = command("verify", path, folder, "--digest", built["digest"])
    assert passed.returncode == 0 and "is the folder that was audited: 8 files" in passed.stdout
    shown = command("show", path)
    assert shown.returncode == 0 and shown.stdout.startswith(card.NOTICE)
    assert "not asked: toxicity" in shown.stdout and "at chance" in shown.stdout
    flip(folder / "model.safetensors")
    failed = command("verify", path, folder)
    assert failed.returncode == 1 and failed.stderr.startswith("model.safetensors has changed")
    edited(path, lambda c: c["findings"].clear())
    refused = command("verify", path, folder)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert "has been edited" in refused.stderr


def test_a_forged_card_ends_in_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forged = made(folder)
    del forged["checkpoint"]["files"]
    forged["digest"] = card.digest(forged)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(forged))
    for line in (["verify", str(path), str(folder)], ["show", str(path)]):
        monkeypatch.setattr(sys, "argv", ["card", *line])
        with pytest.raises(SystemExit, match="1"):
            card.main()
        assert "is damaged: it lacks 'files'." in capsys.readouterr().err
    path = card.write(made(folder), tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["card", "verify", str(path), str(folder), "--digest", "0"]
    )
    with pytest.raises(SystemExit, match="1"):
        card.main()
    assert "has the digest" in capsys.readouterr().err


def test_a_card_can_be_checked_without_torch() -> None:
    code = "import sys; import trinity_lib.card; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_code_outside_a_repository_is_no_evidence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = record.provenance() | {"git_commit": "unknown"}
    monkeypatch.setattr(record, "provenance", lambda: about)
    assert "code" not in made(folder)["evidence"]
