"""The GPU benchmark's program, rehearsed at toy size on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "layer.py"


def printed(*arguments: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so_and_ends() -> None:
    (line,) = printed()
    assert "torch sees none" in line


def test_the_layer_benchmark_rehearses() -> None:
    lines = printed("--rehearse", "--rounds", "1", "--profile")
    (case,) = json.loads(lines[-1])["cases"]
    assert case["max_vio"] > 0 and max(case["errors"].values()) < 1e-5
    assert set(case["errors"]) == {"ours, torch", "transformers grouped_mm"}
    assert set(case["left_out"]) == {"ours, megablocks", "MegaBlocks dMoE"}
    assert all("TRITON_INTERPRET=1" in reason for reason in case["left_out"].values())
    rows = {(row["who"], row["mode"]): row for row in case["rows"]}
    alone = ("router", "permutation", "grouped products", "shared expert")
    for who in (*case["errors"], *(f"{part} alone" for part in alone)):
        for mode in ("forward", "forward+backward"):
            middle, low, high = rows[who, mode]["ms"]
            assert 0 < low <= middle <= high
    assert rows["dense product", ""]["share"] == 1
    assert any("trinity::experts_backward" in line for line in lines)  # of the profile
