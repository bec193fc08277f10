"""Every balancer by its name."""

from trinity_lib import assignment, auxiliary, balance
from trinity_lib.balance import BalanceConfig, Balancer, Sizes

BALANCERS: dict[str, type[Balancer]] = {
    "none": balance.Unbalanced,
    "switch": auxiliary.Switch,
    "sequence": auxiliary.SequenceWise,
    "global": auxiliary.GlobalBatch,
    "loss_free": balance.Biased,
    "sign": balance.Biased,
    "proportional": balance.Biased,
    "smebu": balance.Biased,
    "quantile": assignment.Quantile,
    "bip": assignment.Bip,
    "phi": auxiliary.Phi,
    "sinkhorn": assignment.Sinkhorn,
    "expert_choice": assignment.ExpertChoice,
    "dropout": assignment.Dropout,
    "hash": assignment.Hash,
}
"""Classes by `BalanceConfig.method`."""


def build(
    config: BalanceConfig,
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    vocab_size: int,
    seed: int,
    device: str = "cpu",
    rank: int = 0,
    ranks: int = 1,
) -> Balancer:
    """The balancer that `config` names, before its first step, for `num_layers` MoE layers."""
    sizes = Sizes(num_layers, num_experts, top_k, vocab_size, seed, device, rank, ranks)
    return BALANCERS[config.method](config, sizes)
