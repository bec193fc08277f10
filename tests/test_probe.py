"""The probe: an equal share of every domain, and churn from one look to the next."""

import numpy as np
import torch

from trinity_lib import probe
from trinity_lib.data import Batch
from trinity_lib.evaluate import Domain
from trinity_lib.model import ModelConfig, Trinity


def domain(rows: int, length: int, first: int, padded: int = 0) -> Domain:
    tokens_BS = np.arange(first, first + rows * length).reshape(rows, length) % 300
    documents_BS = np.zeros_like(tokens_BS)
    if padded:
        documents_BS[0, -padded:] = -1
    return Domain(Batch(tokens_BS, tokens_BS + 1, documents_BS), 1, 1.0, 1.0)


def test_every_domain_has_its_share() -> None:
    chosen = probe.choose({"a": domain(9, 8, 0), "b": domain(9, 8, 100, padded=3)}, 64)
    assert chosen.batch.tokens_BS.shape == (8, 8)
    assert np.bincount(chosen.domain_P).tolist() == [32, 29]
    table = chosen.table
    assert {len(column) for column in table.values()} == {61}
    np.testing.assert_array_equal(table["token"][:4], [0, 1, 2, 3])
    np.testing.assert_array_equal(table["next"][:4], [1, 2, 3, 4])


def test_a_row_is_the_least() -> None:
    chosen = probe.choose({"a": domain(1, 8, 0), "b": domain(2, 8, 0)}, 1)
    assert len(chosen.batch.tokens_BS) == 2


def test_churn_is_what_changed_since_the_last_look(tiny_model: ModelConfig) -> None:
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(0))
    chosen = probe.choose({"a": domain(4, 16, 0)}, 64)
    first = probe.look(model, chosen, lambda _: None)
    values = probe.values(first, None)
    assert np.isnan(values["churn"]).all() and (values["override"] == 0).all()
    same = probe.values(probe.look(model, chosen, lambda _: None), first)
    assert (same["churn"] == 0).all()
    bias_LE = torch.zeros(3, 8)
    bias_LE[1, 2] = 5.0  # every token of the second MoE layer now takes expert 2
    model.load_bias(bias_LE)
    moved = probe.look(model, chosen, lambda _: None)
    values = probe.values(moved, first)
    assert (moved.experts_LPK[1] == 2).any(-1).all()
    assert values["churn"][0] == 0 < values["churn"][1]
    assert values["churn"][1] == values["churn_by_bias"][1]
    assert values["churn_by_weights"][1] == 0
    before = (first.experts_LPK[1] == 2).any(-1).mean()
    np.testing.assert_allclose(values["churn"][1], (1 - before) / 2)  # one of two slots
    assert values["override"][1] == values["churn"][1] and values["score_price"][1] < 1


def test_fixed_choices_are_looked_at_as_they_are(tiny_model: ModelConfig) -> None:
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(0))
    chosen = probe.choose({"a": domain(2, 16, 0)}, 32)
    held_LTK = torch.arange(2).expand(3, 32, 2)
    looked = probe.look(model, chosen, lambda _: held_LTK)
    assert (looked.experts_LPK == np.array([0, 1])).all()
