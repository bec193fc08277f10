"""What a toy training step costs, part by part, as ratios measured side by side in one run.

    python benchmarks/step.py [repetitions]

Every variant takes one step in turn, so that a busy machine slows all alike; a ratio is the
median over repetitions of variant / baseline. The last line is one JSON object.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from trinity_lib import recipes
from trinity_lib.config import override
from trinity_lib.session import start
from trinity_lib.step import optimiser_step
from trinity_lib.train import CACHE

VARIANTS: dict[str, dict] = {
    "toy (muon, smebu)": {},
    "adamw for all": {"optim.optimizer": "adamw"},
    "no balancer": {"balance.method": "none"},
    "recomputed activations": {"recompute": True},
    "1 micro-batch, not 4": {"micro_batches": 1},
    "256 experts, not 32": {"model.router.num_experts": 256},
}


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for i, (label, changes) in enumerate(VARIANTS.items()):
            config = dataclasses.replace(override(recipes.toy(), changes), name=f"v{i}")
            sessions[label] = start(config, Path(folder), CACHE)
        seconds: dict[str, list[float]] = {label: [] for label in sessions}
        for repetition in range(repetitions + 1):
            for label, session in sessions.items():
                batch = session.rows.batch(session.config.phases[0].batch)
                begun = time.perf_counter()
                optimiser_step(session, batch)
                if repetition:  # the first is a warm-up
                    seconds[label].append(time.perf_counter() - begun)
        for session in sessions.values():
            session.writer.close("failed", "a benchmark, not a run")
    baseline = seconds[next(iter(seconds))]
    table = {}
    for label, times in seconds.items():
        ratios = [t / b for t, b in zip(times, baseline, strict=True)]
        table[label] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        middle, low, high = table[label]
        print(f"{label:28} x {middle:.2f}  ({low:.2f} to {high:.2f})")
    print(json.dumps({"repetitions": repetitions, "torch": torch.__version__, "ratios": table}))


if __name__ == "__main__":
    main()
