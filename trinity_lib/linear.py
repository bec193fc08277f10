"""Linear layers; in decoding, products of a few rows through the C++ operator."""

import torch
from torch import Tensor, nn

from trinity_lib import native, onednn


class Linear(nn.Linear):
    """torch's, without a bias unless asked and without values: `initialise` gives them.

    torch's own values come from the global generator, and on the meta device it imports
    150 MB of packages to draw them.
    """

    native = True
    """Whether the C++ operator may be used."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False) -> None:
        super().__init__(fan_in, fan_out, bias=bias)

    def reset_parameters(self) -> None:
        """Draw nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return project(x, self)[0]


def project(x: Tensor, *layers: Linear) -> list[Tensor]:
    """Every layer's output for the same input."""
    outputs = products(x, *(w.weight for w in layers), few=all(w.native for w in layers))
    pairs = zip(outputs, layers, strict=True)
    return [y if layer.bias is None else y + layer.bias for y, layer in pairs]


def products(x: Tensor, *matrices: Tensor, few: bool = True) -> list[Tensor]:
    """x times every matrix [F, D], transposed.

    Without gradients, a decoding step's few rows go through the C++ operator, where that is
    there and `few` allows it: MKL reads a matrix for them at a fifth of memory's speed.
    """
    few = few and 0 < x.numel() <= native.FEW_ROWS * x.shape[-1]
    if few and not torch.is_grad_enabled() and _native_takes(x.device.type, x.dtype):
        flat = x.reshape(-1, x.shape[-1])
        outputs = torch.ops.trinity_native.few_rows(flat, list(matrices))
        return [y.view(*x.shape[:-1], -1) for y in outputs]
    return [onednn.linear(x, matrix) for matrix in matrices]


@torch.compiler.assume_constant_result
def _native_takes(device: str, dtype: torch.dtype) -> bool:
    plain = not torch.is_autocast_enabled(device)
    return device == "cpu" and dtype == torch.float32 and plain and not native.missing()
