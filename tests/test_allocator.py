"""Freed memory stays with the process: counted in page faults."""

import subprocess
import sys

from trinity_lib.allocator import keep_memory

FAULTS = """
import resource, sys
import torch
from trinity_lib.allocator import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def step():
    return torch.ones(16_000_000).add(1).sum()
for _ in range(12):  # until the heap has found its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_step_takes_its_memory_from_the_step_before() -> None:
    assert keep_memory().startswith(("glibc malloc keeping", "the platform's"))
    if sys.platform == "linux":
        assert faults("keep") < 100 < faults("leave")
