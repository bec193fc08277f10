"""Shared fixtures: a tiny run on procedural text, the same on every Python."""

from pathlib import Path

import pytest

from trinity_lib.attention import AttentionConfig
from trinity_lib.balance import BalanceConfig
from trinity_lib.data import DataConfig
from trinity_lib.model import ModelConfig
from trinity_lib.optim import OptimConfig, Phase
from trinity_lib.routing import RouterConfig
from trinity_lib.run import RunConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip themselves where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tokenizers and tokens for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """Four layers, one dense, one global, eight experts."""
    return ModelConfig(
        vocab_size=384,
        width=32,
        num_layers=4,
        num_dense_layers=1,
        dense_width=64,
        expert_width=16,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16, window=16),
        router=RouterConfig(num_experts=8, top_k=2, route_scale=2.0),
    )


@pytest.fixture(scope="session")
def tiny(tiny_model: ModelConfig) -> RunConfig:
    """A second of training: two phases on arithmetic and facts."""
    mixture = {"facts": 0.5, "arithmetic": 0.5}  # not sorted, as JSON would have it
    return RunConfig(
        scale="tiny",
        model=tiny_model,
        data=DataConfig(corpus="procedural", sequence_length=32, rsdb=4, validation_rows=4),
        balance=BalanceConfig(method="smebu", rate=1e-2),
        optim=OptimConfig(muon_rate=2e-2, adamw_rate=5e-3),
        phases=(
            Phase(tokens=6 * 8 * 32, batch=8, warmup=2, mixture=mixture),
            Phase(tokens=4 * 8 * 32, batch=8, shape="cosine", end=0.1, mixture=mixture),
        ),
        micro_batches=2,
        evaluate_every=4,
        threads=1,
    )
