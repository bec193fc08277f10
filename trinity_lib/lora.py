"""Low-rank adapters on chosen parts of a model, and back into plain weights.

W + (alpha/r) B A with B zero at first (Hu et al. 2021, arXiv 2106.09685, equation 3).
Linear modules get `peft`'s layers. The router's weight and the experts', which are
parameters and no modules, get a parametrisation of ours: a pair of matrices for each expert,
multiplied as a batch.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trinity_lib import initial
from trinity_lib.config import BadValue, Missing, check, require
from trinity_lib.experts import Experts
from trinity_lib.model import Trinity
from trinity_lib.routing import Router

Part = Literal["attention", "experts", "router", "shared", "dense"]
LINEAR: dict[str, str] = {
    "attention": r"attention\.(query|key|value|gate|out)",
    "shared": r"shared\.(gate|up|down)",
    "dense": r"dense\.(gate|up|down)",
}
"""Modules of a block that are linear layers, by the part they belong to."""
STACKED: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    Experts: ("experts", ("gate_EFD", "up_EFD", "down_EFD")),
    Router: ("router", ("weight_ED",)),
}
"""Parameters of modules that are none, with their part."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which parts are adapted, and by how much."""

    on: tuple[Part, ...] = ("attention", "experts")
    """Parts of the model that get adapters; all else is frozen."""
    rank: int = 8
    """Rank of an adapter."""
    alpha: float = 16.0
    """An adapter's product is multiplied by alpha / rank."""
    rate: float = 10.0
    """Peak learning rate, in AdamW's: adapters bear more than whole weights."""

    def __post_init__(self) -> None:
        check(self)
        require(len(self.on) > 0, "lora.on", self.on, "at least one part")
        require(len(set(self.on)) == len(self.on), "lora.on", self.on, "parts named once each")
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above zero")
        require(self.rate > 0, "lora.rate", self.rate, "above zero")


class LowRank(nn.Module):
    """A parametrisation: a weight [.., X, Y] and a product of two thin ones."""

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        *stack, x, y = weight.shape
        self.scale = config.alpha / config.rank
        self.A_ERY = nn.Parameter(weight.new_zeros(*stack, config.rank, y))
        self.B_EXR = nn.Parameter(weight.new_zeros(*stack, x, config.rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The whole weight."""
        with torch.autocast("cuda", enabled=False):
            return weight + self.scale * (self.B_EXR @ self.A_ERY)


def attach(model: Trinity, config: LoraConfig, seed: int) -> dict[str, nn.Parameter]:
    """Freeze a model and put adapters on its parts; the adapters' parameters by name.

    What the model computes is unchanged until they are trained. BadValue for a part that
    the model has not, Missing where `peft` is needed and not there.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    if linear := [LINEAR[part] for part in config.on if part in LINEAR]:
        found |= _on_linear(model, config, linear)
    for path, module in list(model.named_modules()):
        part, names = next((v for k, v in STACKED.items() if isinstance(module, k)), ("", ()))
        if part not in config.on:
            continue
        for name in names:
            pair = LowRank(getattr(module, name), config)
            parametrize.register_parametrization(module, name, pair)
            found |= {f"{path}.{name}.A": pair.A_ERY, f"{path}.{name}.B": pair.B_EXR}
    _require_parts(config, found)
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.requires_grad_(True)
            if name.endswith(".A"):  # of the variance that peft's own first weights have
                sigma = (3 * parameter.shape[-1]) ** -0.5
                initial.draw(parameter, name, seed=seed, sigma=sigma)
            else:
                parameter.zero_()
    return found


def merge(model: Trinity) -> None:
    """Make plain weights of a model and its adapters, all of them trainable again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
    if any(hasattr(module, "lora_A") for module in model.modules()):
        from trinity_lib import _peft

        _peft.merge(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _on_linear(
    model: Trinity, config: LoraConfig, modules: list[str]
) -> dict[str, nn.Parameter]:
    try:
        from trinity_lib import _peft
    except ImportError as error:
        raise Missing(
            "lora_on names linear layers, which need the package peft: pip install peft, or "
            "take experts and router alone."
        ) from error
    pattern = rf"blocks\.\d+\.({'|'.join(modules)})"
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        return {}
    adapted = _peft.attach(model, pattern, config.rank, config.alpha)
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted.items():
        for kind, pairs in (("A", layer.lora_A), ("B", layer.lora_B)):
            for pair in pairs.values():
                found[f"{name}.{kind}"] = pair.get_parameter("weight")
    return found


def _require_parts(config: LoraConfig, found: dict[str, nn.Parameter]) -> None:
    """BadValue for a part without a single adapter."""
    has = {name.split(".")[2] for name in found}
    for part in config.on:
        if part not in has:
            raise BadValue(f"lora_on is {', '.join(config.on)}; the model has no {part}.")
