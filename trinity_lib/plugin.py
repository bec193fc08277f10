"""Makes `lm_eval --model trinity` find `harness`: lm_eval 0.4.13 looks for no outside models.

`install` writes one line into this Python's site-packages, which waits for lm_eval to be
imported and then names our model to it; `remove` takes it back.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

WATCHED = "lm_eval.models"
LINE = (
    "import importlib.util as u; "
    "u.find_spec('trinity_lib') and __import__('trinity_lib.plugin').plugin.watch()\n"
)


class Watcher:
    """Waits for lm_eval's own models to be registered, and adds ours."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's protocol: None, or lm_eval's module with one more thing to do."""
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            loader.exec_module = execute_and_register
        return spec


def watch() -> None:
    """Wait for lm_eval to be imported in this process."""
    sys.meta_path.insert(0, Watcher())  # type: ignore[arg-type]


def register() -> None:
    """Name our model to lm_eval, which imports it when it is asked for."""
    from lm_eval.api.registry import model_registry

    if "trinity" not in model_registry:
        model_registry.register("trinity", target="trinity_lib.harness:TrinityLM")


def install() -> None:
    """Let this Python's lm_eval know `--model trinity`, from its next start on."""
    file = _file()
    file.write_text(LINE)
    print(f"lm_eval --model trinity: {file}")


def remove() -> None:
    """Take `install` back."""
    _file().unlink(missing_ok=True)


def _file() -> Path:
    return Path(sysconfig.get_path("purelib")) / "trinity_lm_eval.pth"
