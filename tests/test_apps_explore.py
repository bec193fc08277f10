"""The app `explore`, headless: over every kind of folder, without an error or torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests import synthetic
from tests.test_browse import saved
from trinity_lib.run import RunConfig
from trinity_lib.train import train

APP = Path(__file__).parent.parent / "notebooks" / "explore.py"
HEADLESS = """
import runpy, sys
for folder in sys.argv[1:]:
    sys.argv = ["explore.py", "--", "--runs", folder]
    runpy.run_path({app!r}, run_name="__main__")
assert "torch" not in sys.modules
"""
SHOWN = """
import sys
sys.path.insert(0, {parent!r})
from explore import app
for folder in sys.argv[1:]:
    sys.argv = ["explore.py", "--", "--runs", folder]
    outputs, _ = app.run()
    print("FOLDER", *(getattr(output, "text", output) for output in outputs))
"""


@pytest.fixture(scope="module")
def folders(
    tiny: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A real run, runs of every kind beside damage, kernels alone, damage alone, nothing."""
    root = tmp_path_factory.mktemp("folders")
    places = [root / name for name in ("real", "mixed", "kernels", "damaged", "empty")]
    for place in places:
        place.mkdir()
    train(dataclasses.replace(tiny, name="real"), runs=places[0], cache=cache)
    saved(synthetic.run(dead=2), places[1] / "one.nc")
    saved(synthetic.run(method="none"), places[1] / "two.nc")
    saved(synthetic.kernels(), places[1] / "kernels.nc")
    saved(synthetic.kernels(), places[2] / "kernels.nc")
    for place in (places[1], places[3]):
        (place / "torn.nc").write_bytes((places[0] / "real.nc").read_bytes()[:5000])
    return [*map(str, places), str(root / "missing")]


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_marimo_has_nothing_to_say_about_it() -> None:
    command = [sys.executable, "-m", "marimo", "check", "--strict", str(APP)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_headless_over_any_folder_without_torch(folders: list[str]) -> None:
    python(HEADLESS.format(app=str(APP)), *folders)


def test_it_says_in_a_sentence_what_there_is_not(folders: list[str]) -> None:
    shown = python(SHOWN.format(parent=str(APP.parent)), *folders).split("FOLDER")[1:]
    real, mixed, kernels, damaged, empty, missing = shown
    assert "Left out" not in real and "Choose two runs or more" in real
    assert "Left out" in mixed and "torn.nc is not a run" in mixed
    for shown_runs in (real, mixed):  # the biases stand in a stack, which is HTML
        assert shown_runs.count("<Figure size") == 2
    assert "None of these runs has steps to draw" in kernels
    assert kernels.count("has no /routing") == 1
    assert "holds no run that can be read" in damaged and "torn.nc" in damaged
    assert "holds no run yet" in empty
    assert "There is no folder" in missing
