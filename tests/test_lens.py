"""The lens says what the last block says there, and before that what is in the stream."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from tests import conversing
from trinity_lib import hidden, lens
from trinity_lib.chat import pack
from trinity_lib.config import BadValue
from trinity_lib.dialogues import Question, ask
from trinity_lib.lens import Lens, Target
from trinity_lib.model import ModelConfig, Trinity

PROMPTS = ["Tom lives in", "Anna Bell plays the", "12 plus 30 is", "no", "The cat"]


def wanted() -> list[Target]:
    places = hidden.last(conversing.vocabulary(), PROMPTS)
    return [Target(place, 270 + 3 * n, f"c{n // 2}") for n, place in enumerate(places)]


def silent(config: ModelConfig) -> Trinity:
    """A model whose blocks add nothing."""
    model = conversing.model(config)
    with torch.no_grad():
        for block in model.blocks:
            block.attention_post_norm.weight_D.zero_()
            block.mlp_post_norm.weight_D.zero_()
    return model


def test_where_blocks_add_nothing_all_say_the_same(tiny_model: ModelConfig) -> None:
    found = lens.of_targets(silent(tiny_model), wanted())
    assert found.rank.shape == (tiny_model.num_layers + 1, len(PROMPTS))
    assert np.all(found.divergence == 0) and np.all(found.rank == found.rank[0])


def test_an_answer_in_the_embedding_has_depth_0(tiny_model: ModelConfig) -> None:
    model = silent(tiny_model)
    said = [int(model(torch.from_numpy(t.place.tokens)[None]).logits[0, -1].argmax())
            for t in wanted()]  # fmt: skip
    targets = [t._replace(token=token) for t, token in zip(wanted(), said, strict=True)]
    targets[1] = targets[1]._replace(token=(said[1] + 1) % 384)
    found = lens.of_targets(model, targets)
    assert np.array_equal(found.depth, [0, np.nan, 0, 0, 0], equal_nan=True)


def test_it_is_the_norm_and_the_head_on_every_state(tiny_model: ModelConfig) -> None:
    model = conversing.model(tiny_model)
    found = lens.of_targets(model, wanted())
    for n, target in enumerate(wanted()):
        output = model(torch.from_numpy(target.place.tokens)[None], hidden=True)
        logits = [model.head(model.norm(h[0, -1])).detach().numpy() for h in output.hidden]
        np.testing.assert_allclose(logits[-1], output.logits[0, -1].detach(), 1e-4, 1e-6)
        shares = np.exp(log_softmax(np.array(logits, dtype=float), axis=-1))
        right = rel_entr(shares[-1], shares).sum(-1)
        np.testing.assert_allclose(found.divergence[:, n], right, rtol=1e-3, atol=1e-6)
        above = (shares > shares[:, [target.token]]).sum(-1)
        assert np.array_equal(found.rank[:, n], 1 + above)
    assert np.all(found.divergence[-1] == 0) and found.divergence[:-1].min() > 1e-3


def test_a_head_that_says_nothing_puts_no_token_first(tiny_model: ModelConfig) -> None:
    model = conversing.model(tiny_model)
    torch.nn.init.zeros_(model.head.weight)
    found = lens.of_targets(model, wanted())
    assert np.all(found.rank == (tiny_model.vocab_size + 1) / 2) and not found.first.any()
    assert np.isnan(found.depth).all()


def test_rows_are_looked_at_wherever_they_have_a_target(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, template = conversing.model(tiny_model), conversing.template()
    examples = [
        template.encode(Question("t", ask(f"{n}: who?"), "no one").conversation)
        for n in range(12)
    ]
    batch = pack(examples, 32).batch
    whole = lens.of_rows(model, batch)
    monkeypatch.setattr(lens, "LOGITS", 384 * 5)
    monkeypatch.setattr(lens, "ROWS_AT_ONCE", 2)
    pieces = lens.of_rows(model, batch)
    np.testing.assert_allclose(whole.divergence, pieces.divergence, rtol=1e-3, atol=1e-6)
    known = batch.targets_BS >= 0
    assert whole.clusters == pieces.clusters == tuple(f"row {r}" for r in known.nonzero()[0])
    parts = (torch.from_numpy(a) for a in (batch.tokens_BS, batch.documents_BS))
    logits = model(*parts).logits.detach().numpy()[known]
    own = logits[np.arange(len(logits)), batch.targets_BS[known]]
    assert np.array_equal(whole.rank[-1], 1 + (logits > own[:, None]).sum(-1))
    empty = batch._replace(targets_BS=np.full_like(batch.targets_BS, -1))
    with pytest.raises(BadValue, match="rows with targets"):
        lens.of_rows(model, empty)


def test_depth_counts_from_the_last_time_it_was_not_first() -> None:
    rank = np.array([[1, 1, 5, 2, 1.5], [1, 2, 1, 2, 1], [1, 1, 1, 2, 1], [1, 1, 1, 1, 3]])
    found = Lens(np.zeros_like(rank), rank, tuple("abcde"))
    assert np.array_equal(found.depth, [0, 2, 1, 3, np.nan], equal_nan=True)


def test_stages_are_compared_on_what_all_of_them_know() -> None:
    zero = np.zeros((3, 4))
    early = Lens(zero, np.array([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2.0]]), tuple("aabc"))
    late = Lens(zero, np.array([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 1, 1.0]]), tuple("aabc"))
    found = lens.dataset({"early": early, "late": late})
    assert found.depth.values.tolist() == [0, pytest.approx(4 / 3)]  # by cluster
    assert found.shared_depth.values.tolist() == [0, 0]
    assert found.units.values.tolist() == [1, 3]
    assert found.right.values.tolist() == [[0.5] * 3, [0.5, 0.5, 1]]
    none = lens.dataset({"none": Lens(zero, zero + 2, tuple("aabc"))})
    assert np.isnan(none.depth.item()) and none.shared_units.item() == 0
    with pytest.raises(BadValue, match="same blocks and targets"):
        lens.dataset({"early": early, "late": late._replace(clusters=tuple("abcd"))})


def test_an_answer_of_several_tokens_is_refused() -> None:
    vocabulary = conversing.vocabulary()
    single = lens.targets(vocabulary, ["7", "8"], ["1", "2"], ["x", "y"])
    assert [vocabulary.decode([[each.token]])[0] for each in single] == ["1", "2"]
    assert [each.cluster for each in single] == ["x", "y"]
    for answer in ("12", ""):
        with pytest.raises(BadValue, match="must be a single token after its prompt"):
            lens.targets(vocabulary, ["7"], [answer], ["x"])


def test_what_a_block_would_say_of_some_tokens_is_of_the_head(
    tiny_model: ModelConfig,
) -> None:
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(3))
    place = hidden.Place(np.array([5, 9, 2, 7]), 2)
    tokens = [4, 11, 30]
    found = lens.shares(model, [place, place], tokens)
    assert found.shape == (tiny_model.num_layers + 1, 2, 3)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 2, 7]])).logits[0, 2, tokens]
    wanted = logits.double().log_softmax(-1).numpy()
    np.testing.assert_allclose(found[-1, 0], wanted, atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
