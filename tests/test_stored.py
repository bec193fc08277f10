"""Tensors of several checkpoints, one after another."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from trinity_lib import afmoe, hub, stored
from trinity_lib.model import ModelConfig


def test_every_tensor_comes_once_in_the_models_order(
    tiny_model: ModelConfig, tmp_path: Path
) -> None:
    models = {}
    for seed, stage in enumerate(("base", "instruct")):
        models[stage] = hub.empty(tiny_model, "cpu", torch.bfloat16)
        models[stage].initialise(torch.Generator().manual_seed(seed))
        hub.save(models[stage], tmp_path / stage, shard_bytes=20_000 + 30_000 * seed)
    held = {stage: stored.inspect(tmp_path / stage) for stage in models}
    stored.require_alike(held)
    names = list(afmoe.places(tiny_model))
    assert list(held["base"].parts) == names
    seen = []
    for name, tensors in stored.streamed(held, names):
        seen.append(name)
        for stage, tensor in tensors.items():
            there = afmoe.views(models[stage])[name]
            assert tensor.dtype == there.dtype and torch.equal(tensor, there)
    assert seen == names


def test_memory_is_that_of_a_few_tensors(tiny_model: ModelConfig, tmp_path: Path) -> None:
    """Two models of 200 MB are read in less than 50 MB: pages of `hub.AT_ONCE` bytes each."""
    config = replace(
        tiny_model, width=256, expert_width=64, num_layers=3,
        router=replace(tiny_model.router, num_experts=512),
    )  # fmt: skip
    model = hub.empty(config, "cpu", torch.float32)
    model.initialise(torch.Generator().manual_seed(0))
    hub.save(model, tmp_path / "model", shard_bytes=60 * 10**6)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert size > 200e6
    code = f"""
import re
from pathlib import Path
from trinity_lib import stored
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder = Path({str(tmp_path / "model")!r})
held = {{stage: stored.inspect(folder) for stage in ("base", "instruct")}}
Path("/proc/self/clear_refs").write_text("5")  # else the peak is that of the process we left
start, total = peak(), 0.0
for name, tensors in stored.streamed(held, list(held["base"].parts)):
    total += sum(float(tensor.sum()) for tensor in tensors.values())
print(peak() - start)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 50e6, f"{int(out.stdout):,} bytes"
