"""Balancers that set who goes where: by all scores of a batch, by chance, or by token id.

Tk choices over E experts are k T/E each if they are even. `quantile` and `bip` look for the
biases under which top-k comes to that, `sinkhorn` for a scaling of the scores,
`expert_choice` lets experts choose; `dropout` takes scores away at random, and `hash` has none.
Padding is no token here: it takes nobody's place.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trinity_lib.balance import BalanceConfig, Balancer, Routed, Sizes, Unmoved

BINS, REACH, FINE = 1024, 2.0, 1e-3
"""Bins of `margin_counts`, the largest margin, and where bins begin to widen."""
DROPPED = 100.0
"""What `dropout` takes off: more than scores and biases differ, and still in their order."""


def kth_largest(values: Tensor, k: int, dim: int) -> Tensor:
    """The k-th largest along `dim`, or the least where there are fewer."""
    return values.topk(min(k, values.shape[dim]), dim).values.select(dim, -1)


def margin_counts(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """How many margins of each expert fall into each bin, [E, BINS], int64.

    A margin is `s_ti - alpha_t`, alpha_t the (k+1)-th largest of `s_t + b`: an expert is
    among the first k where it exceeds -b_i. With scores from 0 to 1, biases set by
    `quantile_bias` lie within 1 of each other, and margins between -2 and 2. Bins are even
    in asinh(margin / FINE), a sixtieth of a margin wide: softmax over many experts differs in
    the third digit, sigmoids in the first. What is beyond counts in the end bins.
    """
    alpha_T = kth_largest(scores_TE + bias_E, top_k + 1, -1)
    scaled_TE = ((scores_TE - alpha_T.unsqueeze(-1)) / FINE).asinh() / math.asinh(REACH / FINE)
    bins_TE = ((scaled_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    num_experts = scores_TE.shape[-1]
    bins_TE = bins_TE + BINS * torch.arange(num_experts, device=bins_TE.device)
    counts = torch.bincount(bins_TE.flatten(), minlength=num_experts * BINS)
    return counts.view(num_experts, BINS)


def quantile_bias(counts_LEN: Tensor, top_k: int) -> Tensor:
    """The bias at which each expert would have been among the first k in k/E of the tokens.

    b_i = -(1 - k/E quantile of its margins), minus the mean, with margins spread evenly
    within a bin: Su 2026 (kexue.fm/archives/11619), Kimi K3 (arXiv 2607.24653, equations
    13-14). It is one step of coordinate descent on the dual of the even assignment.
    """
    reach = math.asinh(REACH / FINE)
    even_N = torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64)
    edges_N = (FINE * even_N.sinh()).to(counts_LEN.device)
    above_LEN = counts_LEN.flip(-1).cumsum(-1).flip(-1)
    wanted_LE1 = above_LEN[..., :1] * (top_k / counts_LEN.shape[-2])
    bin_LE1 = (above_LEN >= wanted_LE1).sum(-1, keepdim=True) - 1
    excess_LE1 = above_LEN.gather(-1, bin_LE1) - wanted_LE1
    part_LE1 = excess_LE1 / counts_LEN.gather(-1, bin_LE1).clamp(min=1)
    low_LE1, high_LE1 = edges_N[bin_LE1], edges_N[bin_LE1 + 1]
    bias_LE = -(low_LE1 + part_LE1 * (high_LE1 - low_LE1)).squeeze(-1)
    return bias_LE - bias_LE.mean(-1, keepdim=True)


def bip_prices(scores_TE: Tensor, price_E: Tensor, top_k: int, iterations: int) -> Tensor:
    """The experts' prices q of the even assignment; tokens are ranked by `s - q`.

    Each iteration: p_t = max(0, (k+1)-th largest over experts of s_ti - q_i), then
    q_i = max(0, (kT/E + 1)-th largest over tokens of s_ti - p_t); kT/E is rounded down.
    Sun 2025 (arXiv 2502.15451), the dual of the binary integer program.
    """
    tokens, num_experts = scores_TE.shape
    for _ in range(iterations if tokens else 0):
        worth_T = kth_largest(scores_TE - price_E, top_k + 1, -1).clamp(min=0)
        places = top_k * tokens // num_experts
        paid_TE = scores_TE - worth_T.unsqueeze(-1)
        price_E = kth_largest(paid_TE, places + 1, 0).clamp(min=0)
    return price_E


def sinkhorn_plan(scores_TE: Tensor, top_k: int, iterations: int) -> Tensor:
    """Odds s / (1 - s), scaled in turn to columns of kT/E and to rows of k: the soft plan.

    Clark et al. 2022 (arXiv 2202.01169, S-BASE) scale exp(logits). These odds are that for
    sigmoid scores; for softmax, a reading of it that nears it where scores are small.
    """
    least = torch.finfo(scores_TE.dtype).eps
    scores_TE = scores_TE.clamp(least, 1 - least)
    plan_TE = scores_TE / (1 - scores_TE)
    tokens, num_experts = plan_TE.shape
    for _ in range(iterations):
        plan_TE = plan_TE * (top_k * tokens / num_experts / plan_TE.sum(0))
        plan_TE = plan_TE * (top_k / plan_TE.sum(-1, keepdim=True))
    return plan_TE


def expert_choice(scores_TE: Tensor, top_k: int) -> Tensor:
    """Every expert takes its ceil(kT/E) best tokens: experts [T, K], best first, -1 for none.

    K is the most experts that any token got, at least 1. Zhou et al. 2022 (arXiv
    2202.09368), with capacity factor k.
    """
    tokens, num_experts = scores_TE.shape
    if not tokens:
        return torch.empty(0, 1, dtype=torch.int64, device=scores_TE.device)
    places = -(-top_k * tokens // num_experts)
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    taken_TE.scatter_(0, scores_TE.topk(places, 0).indices, True)
    most = max(1, int(taken_TE.sum(-1).max()))
    best = scores_TE.masked_fill(~taken_TE, -torch.inf).topk(most, -1)
    return best.indices.masked_fill(best.values.isneginf(), -1)


class Quantile(Balancer):
    """Quantile balancing: the bias is set, not stepped, so it has no rate."""

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Margins by expert and bin, [L, E, BINS]."""
        top_k = self.sizes.top_k
        counts = [
            margin_counts(r.scores_TE.detach()[valid_T], bias_E.to(r.scores_TE), top_k)
            for r, bias_E in zip(routing, self.bias_LE, strict=True)
        ]
        return torch.stack(counts)

    def update(self, statistics: Tensor) -> None:
        """Take over the step's quantiles; a layer without tokens keeps its bias."""
        bias_LE = quantile_bias(statistics, self.sizes.top_k).to(self.bias_LE)
        seen_L11 = statistics.sum((-1, -2)).unsqueeze(-1) > 0
        self.bias_LE = torch.where(seen_L11, bias_LE, self.bias_LE)


class Batchwise(Unmoved):
    """What balancers share that choose among all valid tokens of a micro-batch: not causal."""

    valid_T: Tensor

    def begin(self, tokens_BS: Tensor, documents_BS: Tensor) -> Tensor | None:
        """Note which tokens are padding."""
        self.valid_T = documents_BS.flatten() >= 0
        return None


class Bip(Batchwise):
    """BIP balancing: every micro-batch is priced, from the last step's mean prices on.

    The bias is minus those, so that inference, which may not look at other tokens, goes by
    them.
    """

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """Scores less the prices of this micro-batch."""
        return scores_TE - self._prices(scores_TE[self.valid_T], layer)

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Prices times the micro-batch's valid tokens, and those: [L, E + 1], float64."""
        tokens = valid_T.sum().double().view(1)
        rows = [
            torch.cat([self._prices(r.scores_TE.detach()[valid_T], i) * tokens, tokens])
            for i, r in enumerate(routing)
        ]
        return torch.stack(rows)

    def update(self, statistics: Tensor) -> None:
        """The step's mean prices, by tokens; a layer without tokens keeps its own."""
        prices_LE, tokens_L1 = statistics[:, :-1], statistics[:, -1:]
        bias_LE = -(prices_LE / tokens_L1.clamp(min=1)).to(self.bias_LE)
        self.bias_LE = torch.where(tokens_L1 > 0, bias_LE, self.bias_LE)

    def _prices(self, scores_TE: Tensor, layer: int) -> Tensor:
        price_E = -self.bias_LE[layer].to(scores_TE)
        return bip_prices(scores_TE, price_E, self.sizes.top_k, self.config.iterations)


class Sinkhorn(Batchwise):
    """S-BASE: training takes the top-k of the Sinkhorn plan, inference that of the scores."""

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """The plan; padding is ranked by its scores."""
        valid_TE = scores_TE[self.valid_T]
        plan_TE = sinkhorn_plan(valid_TE, self.sizes.top_k, self.config.iterations)
        return scores_TE.masked_scatter(self.valid_T.unsqueeze(-1), plan_TE)


class ExpertChoice(Batchwise):
    """Experts choose tokens: exactly even, and not causal, so for study only.

    Whether a token gets an expert depends on tokens after it: training sees the future, and
    inference, which takes the top-k of the scores, does something else.
    """

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """The choice [T, K]; padding gets no expert."""
        own_TK = expert_choice(scores_TE[self.valid_T], self.sizes.top_k)
        experts_TK = own_TK.new_full((len(scores_TE), own_TK.shape[-1]), -1)
        return experts_TK.masked_scatter(self.valid_T.unsqueeze(-1), own_TK)


class Dropout(Unmoved):
    """Expert dropout: in training, a token's expert is out of the race with chance `rate`.

    A reading of Csordas et al. 2023 (arXiv 2310.10837): each token and expert is drawn for
    itself, and a token with too few experts left takes the best of the others. Draws depend
    on the seed, the micro-batches begun and the layer, and on nothing else.
    """

    def __init__(self, config: BalanceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.begun = 0

    def state(self) -> dict[str, Tensor]:
        """With the micro-batches begun so far."""
        return super().state() | {"begun": torch.tensor(self.begun)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """With the micro-batches begun so far."""
        super().load_state(tensors)
        self.begun = int(tensors["begun"])

    def begin(self, tokens_BS: Tensor, documents_BS: Tensor) -> Tensor | None:
        """Count the micro-batches that the ranks begin together."""
        self.begun += self.sizes.ranks
        return None

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """Scores and bias, less much where dropped."""
        number = self.begun - self.sizes.ranks + self.sizes.rank + 1
        generator = _generator(scores_TE.device, self.sizes.seed, number, layer)
        drawn_TE = torch.rand(scores_TE.shape, generator=generator, device=scores_TE.device)
        return super().select(scores_TE, layer) - DROPPED * (drawn_TE < self.config.rate)


class Hash(Unmoved):
    """Hash layers: token ids choose, by a table drawn once, in training and inference.

    A control that learns no routing: k distinct experts per id and layer, even over ids if
    not over text. Roller et al. 2021 (arXiv 2106.04426, random hash).
    """

    def __init__(self, config: BalanceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        tables = []
        for layer in range(sizes.num_layers):
            generator = _generator(torch.device("cpu"), sizes.seed, layer)
            drawn_VE = torch.rand(sizes.vocab_size, sizes.num_experts, generator=generator)
            tables.append(drawn_VE.topk(sizes.top_k, -1).indices.to(torch.int32))
        self.table_LVK = torch.stack(tables).to(sizes.device)

    def fixed(self, tokens_BS: Tensor) -> Tensor | None:
        """The table's entries."""
        return self.table_LVK[:, tokens_BS.flatten()].long()


def _generator(device: torch.device, *key: int) -> torch.Generator:
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed))
