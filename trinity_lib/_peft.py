"""The only importer of `peft`: its LoRA layers around our linear ones."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from trinity_lib.linear import Linear
from trinity_lib.model import Trinity

with warnings.catch_warnings():  # a progress bar of its own, which is not used here
    warnings.filterwarnings("ignore", "IProgress not found")
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear as LoraLinear


class Adapted(LoraLinear):
    """peft's layer, which also tells its whole weight.

    Attention and SwiGLU multiply by several layers' weights at once (`linear.project`), and
    never call those layers.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base weight, and what its adapters add to it."""
        base: Any = self.get_base_layer()
        whole: Tensor = base.weight
        if self.merged or self.disable_adapters:
            return whole
        with torch.autocast("cuda", enabled=False):
            for name in self.active_adapters:
                if name in self.lora_A:
                    whole = whole + self.get_delta_weight(name)
        return whole

    @property
    def native(self) -> bool:
        """Whether the C++ operator may be used."""
        base: Any = self.get_base_layer()
        return base.native


def attach(model: Trinity, modules: str, rank: int, alpha: float) -> dict[str, Adapted]:
    """Put adapters around the linear modules whose names match; they begin at zero.

    Returns them by the names they had. The first weights of A are peft's own, drawn from a
    fork of the global generator: whoever wants them reproducible draws them again.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number
        target_modules=modules,
        lora_dropout=0.0,
        bias="none",
    )
    config._register_custom_module({Linear: Adapted})
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model)
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its weight and take it off again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
    del model.peft_config
