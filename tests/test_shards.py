"""Checkpoints of several ranks: read by one and by three to the bit, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests import distributed
from tests.distributed import drawn, rows_of, small
from trinity_lib import checkpoint, hub, optim, parallel, shards, tokenizer
from trinity_lib.checkpoint import State
from trinity_lib.config import BadValue, Missing
from trinity_lib.losses import token_loss
from trinity_lib.mesh import Layout, ParallelConfig, joined
from trinity_lib.parallel import Sharded

FACTS = {"step": 7, "losses": [0.1, 1e-300], "big": 2**100}
SAVED = {
    "experts": ParallelConfig(shard=2, experts=2),
    "replicas": ParallelConfig(replicate=2),
}
READ = {
    "shards": ParallelConfig(shard=3),
    "experts": ParallelConfig(shard=3, experts=3),
}
"""Three ranks: 383 tokens are 128, 128 and 127 rows, 5 experts 2, 2 and 1."""


def everything() -> dict[str, Tensor]:
    """Of every parameter its weights, a momentum in fp32, a square in float64, a count."""
    found: dict[str, Tensor] = {}
    for number, (name, p) in enumerate(drawn(small()).named_parameters()):
        found[f"model.{name}"] = p.detach()
        found[f"optimizer.0.momentum.{name}"] = 3 * p.detach() + number
        found[f"optimizer.0.square.{name}"] = p.detach().double().square()
        found[f"optimizer.0.step.{name}"] = torch.tensor(float(number))
    return found


def others() -> dict[str, Tensor]:
    """What every rank has whole."""
    generator = torch.Generator().manual_seed(2)
    return {
        "balancer.momentum": torch.randn(2, 5, generator=generator),
        "balancer.half": torch.randn(3, 4, generator=generator).bfloat16(),
        "rows.tokens": torch.arange(11, dtype=torch.int32),
        "rows.ends": torch.tensor([4, 11]),
        "rows.none": torch.zeros(0, dtype=torch.int64),
        "looked.chosen": torch.tensor([[True, False]]),
    }


def filled(config: ParallelConfig) -> tuple[Sharded, dict[str, Tensor]]:
    """A rank's rows of the weights, and of the optimisers' state."""
    sharded = parallel.shard(small(), Layout(config, "cpu"))
    whole, tensors = everything(), others()
    for name, piece in sharded.pieces.items():
        piece.rows.copy_(rows_of(whole[f"model.{name}"], piece.span))
        for kind in ("momentum", "square"):
            key = f"optimizer.0.{kind}.{name}"
            tensors[key] = rows_of(whole[key], piece.span).clone()
        tensors[f"optimizer.0.step.{name}"] = whole[f"optimizer.0.step.{name}"]
    sharded.model.load_bias(torch.stack([r.bias_E for r in drawn(small()).routers()]))
    return sharded, tensors


def save_both(folder: Path) -> list[Any]:
    """Save, go on with other numbers, and finish: by two expert ranks, by two replicas."""
    seen = []
    with joined(SAVED["experts"], "cpu"):
        for name, config in SAVED.items():
            sharded, tensors = filled(config)
            vocabulary = tokenizer.train(["some text"] * 3, 258)
            saving = shards.save(
                folder / name, sharded, vocabulary, '{"a": 1}', State(FACTS, tensors),
                released=name == "replicas",
            )  # fmt: skip
            for tensor in (*sharded.weights.values(), *tensors.values()):
                tensor.zero_()
            old = (folder / name / "old").exists(), checkpoint.newest(folder) is None
            shards.finish(saving)
            new = saving.done(), saving.step, (folder / name / "old").exists()
            seen.append((old, new))
    return seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "experts" / "old").mkdir(parents=True)
    for first, second in distributed.run(save_both, 2, folder):
        # until all have finished an older folder has the name
        assert first == ((True, True), (True, 7, False))
        assert second == ((False, False), (True, 7, False))
    return folder


def of_one_process(folder: Path) -> tuple[dict[str, Tensor], State]:
    weights = {n: torch.full_like(p, torch.nan) for n, p in drawn(small()).named_parameters()}
    state = shards.load(folder, weights)
    return weights, state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", SAVED)
def test_one_process_reads_what_was_there_when_saving_began(saved: Path, name: str) -> None:
    weights, state = of_one_process(saved / name)
    found = {f"model.{n}": w for n, w in weights.items()} | state.tensors
    assert_same(found, everything() | others())
    assert state.facts == FACTS


def step(sharded: Sharded, optimizers: list[Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mine_BS = torch.randint(383, (3, 12), generator=generator)[sharded.layout.rank, None]
    logits = sharded.model(mine_BS).logits
    token_loss(logits, mine_BS.roll(-1, 1)).cross_entropy.backward()
    parallel.gradients(sharded)
    for optimizer in optimizers:
        optimizer.step()
    parallel.forget_gradients(sharded)


def goes_on(folder: Path) -> list[str]:
    """Which weights differ after a step from a checkpoint: 4 experts are 2, 2 and none."""
    layout, runs = Layout(READ["experts"], "cpu"), []
    for _ in range(2):
        sharded = parallel.shard(small(num_experts=4), layout)
        parallel.initialise(sharded, torch.Generator().manual_seed(0))
        owners = parallel.Owners(sharded)
        built = optim.build(sharded.model, optim.OptimConfig(), sharded.weights, owners)
        runs.append((sharded, built))
    (sharded, built), (again, rebuilt) = runs
    step(sharded, built, 1)
    state = State(FACTS, optim.state_tensors(sharded.weights, built))
    vocabulary = tokenizer.train(["some text"] * 3, 258)
    saving = shards.save(folder, sharded, vocabulary, "{}", state)
    step(sharded, built, 2)  # while it is written
    shards.finish(saving)
    read = shards.load(folder, again.weights, again)
    optim.load_state_tensors(again.weights, rebuilt, read.tensors)
    step(again, rebuilt, 2)
    pairs = zip(sharded.weights.items(), again.weights.values(), strict=True)
    return [name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)]


def read_all(folder: Path, new: Path) -> tuple[int, list[str]]:
    """On three ranks, as every layout: this rank's rows of each tensor, to the bit."""
    whole, tensors = everything(), 0
    with joined(READ["shards"], "cpu"):
        for config in READ.values():
            for name in SAVED:
                sharded = parallel.shard(small(), Layout(config, "cpu"))
                for rows in sharded.weights.values():
                    rows.fill_(torch.nan)
                state = shards.load(folder / name, sharded.weights, sharded)
                expected = others()
                for each, piece in sharded.pieces.items():
                    assert torch.equal(
                        piece.rows, rows_of(whole[f"model.{each}"], piece.span)
                    ), each
                    for kind in ("momentum", "square", "step"):
                        key = f"optimizer.0.{kind}.{each}"
                        full = whole[key]
                        expected[key] = rows_of(full, piece.span) if full.dim() else full
                assert_same(state.tensors, expected)
                assert state.facts == FACTS
                tensors += len(expected)
        return tensors, goes_on(new)


def test_three_ranks_read_their_rows_and_train_on(saved: Path, tmp_path: Path) -> None:
    tensors = 4 * (len(everything()) * 3 // 4 + len(others()))
    found = distributed.run(read_all, 3, saved, tmp_path / "new")
    assert found == [(tensors, [])] * 3


def test_every_rank_wrote_a_part_and_all_are_listed(saved: Path) -> None:
    manifest = checkpoint.verify(saved / "experts")
    listed = set(manifest["files"])
    there = {str(p.relative_to(saved / "experts")) for p in (saved / "experts").rglob("*.*")}
    assert listed == there - {checkpoint.MANIFEST}
    assert {name[:18] for name in listed if "/" in name} == {
        "shards/shard-00001", "shards/shard-00002",
    }  # fmt: skip
    sizes = [about["bytes"] for name, about in manifest["files"].items() if "/" in name]
    numbers = sum(t.numel() * t.itemsize for t in (everything() | others()).values())
    assert numbers < sum(sizes) < 1.2 * numbers + 2**17  # each row once, and headers
    assert manifest["step"] == 7 and not list(saved.glob(".*"))
    assert json.loads((saved / "experts" / checkpoint.RUN).read_text()) == {"a": 1}
    assert checkpoint.load_vocabulary(saved / "experts").end == tokenizer.END


def test_released_weights_are_a_model_of_their_own(saved: Path) -> None:
    assert shards.are_in(saved / "replicas") and not shards.are_in(saved)
    read, whole = hub.load(saved / "replicas"), drawn(small())
    for (name, mine), theirs in zip(read.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for ours, their in zip(read.routers(), whole.routers(), strict=True):
        assert torch.equal(ours.bias_E, their.bias_E)
    with pytest.raises(Missing):
        hub.load(saved / "experts")


def part(folder: Path, rank: int) -> Path:
    return min((folder / shards.FOLDER).glob(f"shard-{rank + 1:05d}-*"))


def lose(folder: Path) -> None:
    part(folder, 1).unlink()


def cut(folder: Path) -> None:
    part(folder, 0).write_bytes(part(folder, 0).read_bytes()[:-10])


def flip(folder: Path) -> None:
    content = bytearray(part(folder, 1).read_bytes())
    content[-5] ^= 1
    part(folder, 1).write_bytes(content)


def lose_facts(folder: Path) -> None:
    (folder / checkpoint.FACTS).unlink()


def lose_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def list_no_part(folder: Path) -> None:
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    kept = {n: about for n, about in manifest["files"].items() if "/" not in n}
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"step": 7, "files": kept}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose, r"is damaged: shards/shard-00002-\S+ is missing\.$"),
        (cut, r"is damaged: shards/shard-00001-\S+ has \S+ bytes and was written with \S+\.$"),
        (flip, r"is damaged: shards/shard-00002-\S+ has changed\.$"),
        (lose_facts, r"is damaged: state.json is missing\.$"),
        (lose_manifest, r"is no checkpoint: it has no manifest.json\.$"),
        (list_no_part, r"is damaged: it does not list all that is needed\.$"),
    ],
)
def test_damage_is_one_sentence(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = tmp_path / "experts"
    shutil.copytree(saved / "experts", folder)
    assert checkpoint.verify(folder)["step"] == 7
    damage(folder)
    with pytest.raises((BadValue, Missing), match=sentence) as error:
        checkpoint.verify(folder)
    assert "\n" not in str(error.value)


def test_two_that_verify_together_read_every_file(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experts"
    shutil.copytree(saved / "experts", folder)
    flip(folder)
    said = []
    for number in range(2):
        try:
            checkpoint.verify(folder, number, 2)
        except BadValue as error:
            said.append(str(error))
    assert len(said) == 1 and "has changed" in said[0]


def test_what_is_read_lies_aligned(saved: Path) -> None:
    """As in checkpoints of one process: unaligned products would round differently."""
    weights, state = of_one_process(saved / "experts")
    places = [t.data_ptr() for t in (*weights.values(), *state.tensors.values()) if t.numel()]
    assert not np.any(np.array(places) % 64)
