"""C++ operators for the CPU, compiled once, where a compiler is at hand."""

import functools
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FEW_ROWS = 8
"""Rows that `few_rows` takes."""
SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "native_muon.cpp")]
HEADER = Path(__file__).with_name("native_products.h")
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""What torch's own kernels are compiled with, by the capability it finds in the CPU."""


@functools.cache
def missing() -> str:
    """Load the operators, compiling them the first time: "", or one clause why not.

    It registers `experts`, `experts_backward`, `few_rows` and `muon` in
    `torch.ops.trinity_native`: routed experts, a matrix times the few rows of a decoding
    step, and an optimiser's step for all experts of a layer. The compiled library
    is kept where torch keeps its extensions (TORCH_EXTENSIONS_DIR), named by the hash of
    the sources, torch and CPU. TRINITY_NATIVE=0 in the environment leaves it out.
    """
    if os.environ.get("TRINITY_NATIVE") == "0":
        return "TRINITY_NATIVE is 0"
    from torch.utils.cpp_extension import get_default_build_root

    capability = torch.backends.cpu.get_cpu_capability()
    flags = (*FLAGS.get(capability, ()), f"-DCPU_CAPABILITY={capability}")
    flags = ("-O3", "-fopenmp", *flags, f"-DCPU_CAPABILITY_{capability}")
    sources = [path.read_text() for path in (*SOURCES, HEADER)]
    identity = "\n".join((*sources, torch.__version__, sys.platform, *flags))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    library = Path(folder) / f"trinity_native_{digest}.so"
    try:
        if library.exists():
            torch.ops.load_library(library)
        else:
            _compile(library, flags)
    except (RuntimeError, OSError) as error:
        return f"the C++ operator cannot be compiled or loaded ({_cause(error)})"
    torch.library.register_fake("trinity_native::few_rows")(_few_rows_shape)
    torch.library.register_fake("trinity_native::muon")(lambda *inputs: None)
    return ""


def _few_rows_shape(x: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(w)) for w in matrices]


def _compile(library: Path, flags: tuple[str, ...]) -> None:
    """Compile and load, in a folder of its own: a killed build leaves torch's lock behind."""
    from torch.utils import cpp_extension

    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        raise OSError(f"no C++ compiler: {cpp_extension.get_cxx_compiler()} is not there")
    print("compiling the C++ operators (once, about half a minute)", file=sys.stderr)
    library.parent.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # ninja is beside this Python where the environment is not activated
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), path))
        try:
            cpp_extension.load(
                library.stem,
                [str(path) for path in SOURCES],
                extra_cflags=list(flags),
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
        finally:
            os.environ["PATH"] = path
        (Path(folder) / library.name).replace(library)


def _cause(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "error" in line.lower()]
    return (lines or [str(error).splitlines()[0]])[-1].strip()[:200]
