"""One list of dependencies, one lock file, and what is installed agree."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
DECLARED = [
    re.split(r"[<>=!~\[ ]", d)[0]
    for d in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
]


@pytest.mark.parametrize("package", DECLARED)
def test_every_dependency_is_pinned_and_installed_so(package: str) -> None:
    pins = {name.lower().replace("_", "-"): version for name, version in PINNED.items()}
    assert package in pins, f"{package} is missing from constraints.txt"
    installed = importlib.metadata.version(package).split("+")[0]
    assert installed == pins[package], f"{package} {installed}; run `make setup`"


def test_torch_is_pinned_without_a_local_label() -> None:
    assert PINNED["torch"] == "2.13.0"
    assert PINNED["triton"] == "3.7.1"
    assert "torch>=2.11" in PROJECT["dependencies"]


def test_conda_users_get_the_same_list() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "trinity"
    *plain, wrapped = environment["dependencies"]
    assert plain == ["python=3.11", "pip"]
    assert wrapped == {"pip": ["-c constraints.txt", "-e .[dev]"]}


@pytest.mark.parametrize(
    ("package", "version"), [("megablocks", "0.10.0"), ("stanford-stk", "0.7.1")]
)
def test_megablocks_is_installed_as_pure_python(package: str, version: str) -> None:
    assert importlib.metadata.version(package) == version
    files = importlib.metadata.files(package) or []
    assert not [f for f in files if f.suffix == ".so"]


def test_nbdime_is_told_what_to_ignore_and_nothing_else() -> None:
    config = json.loads((ROOT / "nbdime_config.json").read_text())
    assert list(config) == ["Diff"] and list(config["Diff"]) == ["Ignore"]


def test_the_commands_of_the_readme_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for word in re.findall(r"^make (\w+)", readme, re.M):
        assert re.search(rf"^{word}:", makefile, re.M), word
