"""MegaBlocks' errors on a CPU, from a process of its own where Triton interprets its kernels.

Triton settles when it is imported whether it interprets, so the process that measures
cannot. `python -m trinity_lib.interpreted` is that other process: KernelsConfig as JSON on
its standard input, errors as JSON on its standard output.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from trinity_lib import agreement
from trinity_lib.agreement import ROUTINGS, Errors
from trinity_lib.config import from_json, one_sentence, to_json
from trinity_lib.experts import backend_info, live
from trinity_lib.kernels_config import KernelsConfig
from trinity_lib.train import reproducible

ROWS = 512
"""Chosen experts of a batch that the interpreter is given: each takes it about 10 ms."""
SECONDS = 900.0
"""Patience with it."""

Case = tuple[int, str]
"""Tokens and routing."""


def errors(config: KernelsConfig) -> tuple[dict[Case, Errors], Any]:
    """MegaBlocks' errors in the cases that are small enough, and what computed them.

    Where there are none, a clause that says why in place of what computed.
    """
    most = ROWS // config.top_k
    tokens = tuple(t for t in config.tokens if t <= most)
    if not tokens:
        return {}, f"on a CPU its kernels are interpreted, and take at most {most} tokens here"
    try:
        done = _run(dataclasses.replace(config, tokens=tokens))
    except subprocess.TimeoutExpired:
        return {}, f"its interpreted kernels took over {SECONDS:.0f} s"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].rstrip(".")
        return {}, f"its process ended with {done.returncode}: {last}"
    rows, about = json.loads(done.stdout.splitlines()[-1])
    return {(tokens, routing): found for tokens, routing, found in rows}, about


def _run(config: KernelsConfig) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trinity_lib.interpreted"],
        input=to_json(config),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def main() -> None:
    """Print MegaBlocks' errors in every case, and what computed them."""
    with one_sentence():
        config = from_json(KernelsConfig, sys.stdin.read())
        live("megablocks", config.device, config.dtype)
        experts = agreement.layer(**config.layer)
        rows = []
        with reproducible(config.threads, config.device):
            for tokens in config.tokens:
                for routing in ROUTINGS:
                    given = agreement.batch(experts, tokens, config.top_k, routing, config.seed)
                    found = agreement.between(experts, given, ["megablocks"])
                    rows.append((tokens, routing, found))
        print(json.dumps([rows, backend_info("megablocks", config.device, config.dtype)]))


if __name__ == "__main__":
    main()
