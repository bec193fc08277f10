"""The C++ operators as built for other CPUs than this one."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from trinity_lib import native

CHECK = """
import torch
from trinity_lib import native
from trinity_lib.experts import Experts
from trinity_lib.muon import Muon
from trinity_lib.routing import Routing

assert native.missing() == "", native.missing()
generator = torch.Generator().manual_seed(0)
experts, results = Experts(5, 70, 45), {}
for weight in experts.parameters():
    torch.nn.init.normal_(weight, std=0.1, generator=generator)
x = torch.randn(150, 70, generator=generator)
picks = torch.rand(150, 5, generator=generator).topk(2).indices
routing = Routing(torch.empty(150, 5), picks, torch.rand(150, 2, generator=generator))
for backend in ("torch", "native"):
    experts.backend = backend
    experts.zero_grad()
    y = experts(x, routing)
    y.square().sum().backward()
    results[backend] = [y.detach(), *(p.grad.clone() for p in experts.parameters())]
for expected, found in zip(*results.values(), strict=True):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
before = experts.gate_EFD.detach().clone()
Muon([experts.gate_EFD], 0.1).step()
by_operator, native.missing = experts.gate_EFD.detach().clone(), lambda: "left out"
experts.gate_EFD.data.copy_(before)
Muon([experts.gate_EFD], 0.1).step()
torch.testing.assert_close(by_operator, experts.gate_EFD.detach(), atol=2e-5, rtol=1e-4)
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(native.missing()), reason="there is no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="not of this kind of CPU")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instructions_compute_the_same(capability: str) -> None:
    """Half a minute each the first time: the operators are compiled for each."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability.upper()


def test_a_library_is_named_by_all_that_makes_it(
    tmp_path: os.PathLike, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of any source, or of flags, is another library."""
    named = []
    monkeypatch.setattr(native, "_compile", lambda library, flags: named.append(library.name))
    monkeypatch.setattr(torch.library, "register_fake", lambda name: lambda function: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("TRINITY_NATIVE", raising=False)
    look = native.missing.__wrapped__
    assert look() == look() == ""
    assert len(named) == 2 and named[0] == named[1]
    for number, path in enumerate((*native.SOURCES, native.HEADER)):
        changed = tmp_path / f"{number}{path.suffix}"
        changed.write_text(path.read_text() + "\n// changed\n")
        with monkeypatch.context() as patch:
            others = [changed if p == path else p for p in native.SOURCES]
            patch.setattr(native, "SOURCES", others)
            patch.setattr(native, "HEADER", changed if path == native.HEADER else native.HEADER)
            look()
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(native, "FLAGS", {capability: ("-DOTHER",)})
    look()
    assert len(set(named)) == 5
