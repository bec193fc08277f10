"""The app that shows SMEBU beside a rival: it is sound, it runs, it redraws at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trinity_lib import plots_simulate, simulate, stability

APP = Path(__file__).parent.parent / "notebooks" / "smebu.py"
RUNS = """
import runpy

app = runpy.run_path({path!r})["app"]
_, defined = app.run()
first, second = defined["runs"]
assert first.attrs["method"] == "smebu" and second.attrs["method"] == "sign"
assert defined["place"].stable and "λ = " in defined["place"].text
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_marimo_finds_nothing_to_say() -> None:
    found = run(sys.executable, "-m", "marimo", "check", "--strict", str(APP))
    assert found.returncode == 0, found.stdout + found.stderr


def test_it_runs() -> None:
    found = run(sys.executable, "-c", RUNS.format(path=str(APP)))
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("rival", simulate.RIVALS)
def test_it_redraws_at_once_at_the_sliders_ends(rival: str) -> None:
    """Under a second on a quiet core; three are left for a busy one."""
    settings = dict(experts=64, top_k=7, tokens=512, drift=0.01, shift=True)
    began = time.perf_counter()
    runs = simulate.beside(rival, 1.0, lam=1.0, kappa=8.0, beta=0.95, **settings)
    image = plots_simulate.png(plots_simulate.trajectories(*runs))
    assert time.perf_counter() - began < 3
    assert len(image) > 10_000


def test_it_says_where_the_setting_lies() -> None:
    slope = stability.slope_of(16, 2)
    most = stability.bound(slope, beta=0.5, kappa=2.0)
    inside = stability.where(most / 2, slope, beta=0.5, kappa=2.0)
    outside = stability.where(most * 2, slope, beta=0.5, kappa=2.0)
    assert inside.stable and "**3**" in inside.text and "50% of the bound" in inside.text
    assert not outside.stable and "**12**" in outside.text and "beyond it" in outside.text
