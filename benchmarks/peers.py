"""This library beside transformers' AfmoeForCausalLM, at the scale `small`, in one process.

    python benchmarks/peers.py [repetitions] [threads]

The same weights, through `hub`, the same allocator settings and the same batch; contestants
take turns. Ratios are over transformers' fastest implementation of the experts. "torch" is
this library without its C++ operator, "native" with it. Compiling is outside the timing; its
seconds are printed. The last line is one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _timing import fastest, interleave, product_rate, rounded, show, speedups
from torch import Tensor, nn

from trinity_lib import balancers, hub, optim, recipes
from trinity_lib.allocator import keep_memory
from trinity_lib.data import IGNORE
from trinity_lib.experts import use_backend
from trinity_lib.generate import compiled_decode, decode, prefill
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity

ROWS, LENGTH, PROMPT, NEW = 8, 256, 32, 24
PEERS = ("grouped_mm", "eager", "batched_mm")
TOLERANCE = 1e-4
MOST_BYTES = 12e9
"""Largest backward worth trying: batched_mm's holds every chosen expert's weights, copied."""


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result: dict[str, Any] = {
        "threads": threads, "repetitions": repetitions, "allocator": keep_memory(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "product_gflops": [product_rate()], "compile_seconds": {},
    }  # fmt: skip
    ours = {"torch": model(), "native": model()}
    for backend, mine in ours.items():
        use_backend(mine, backend)
    with tempfile.TemporaryDirectory() as folder:
        hub.save(ours["torch"], folder)
        peers = {name: peer(Path(folder), name) for name in PEERS}
    tokens_BS = untied_rows(ours["torch"])
    result["largest_difference"] = agree(ours, peers, tokens_BS)
    for rows in (1, ROWS):
        decoding(ours, peers, tokens_BS[:rows, :PROMPT], repetitions, result)
    passes = forward_backward(ours, peers, tokens_BS, result)
    whole_steps(passes, ours, repetitions, result)  # weights move from here on
    balancing(ours["native"], tokens_BS, result)
    result["product_gflops"].append(product_rate())
    print(
        f"\nfp32 matrix product, GFLOP/s before and after: {rounded(result['product_gflops'])}"
    )
    print(f"seconds of compiling: {rounded(result['compile_seconds'])}")
    print(json.dumps(rounded(result)))


def model() -> Trinity:
    """`small` with weights from a seed; gains and selection biases too, so nothing hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        built = Trinity(recipes.small().model)
    built = built.to_empty(device="cpu")
    built.initialise(generator)
    with torch.no_grad():
        for p in built.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        for router in built.routers():
            router.bias_E.normal_(0, 0.05, generator=generator)
    return built


def peer(folder: Path, experts: str) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )


@torch.no_grad()
def untied_rows(built: Trinity) -> Tensor:
    """Random rows in which no token's choice of experts hangs on the last bits.

    Elsewhere contestants may rightly choose another expert, and all that follows differs.
    """
    generator, kept, top_k = torch.Generator().manual_seed(1), [], built.config.router.top_k
    while len(kept) < ROWS:
        row_BS = torch.randint(4096, (1, LENGTH), generator=generator)
        gaps = []
        for layer, router in zip(built(row_BS).routing, built.routers(), strict=True):
            best_TK = (layer.scores_TE + router.bias_E).topk(top_k + 1).values
            gaps.append((best_TK[:, -2] - best_TK[:, -1]).min())
        if min(gaps) > 5e-6:
            kept.append(row_BS)
    return torch.cat(kept)


@torch.no_grad()
def agree(ours: dict, peers: dict, tokens_BS: Tensor) -> float:
    """Nothing is timed before every contestant gives the same logits."""
    expected = peers["grouped_mm"](tokens_BS).logits
    every = {name: built(tokens_BS).logits for name, built in {**ours, **peers}.items()}
    difference = max((logits - expected).abs().max().item() for logits in every.values())
    assert difference <= TOLERANCE, f"logits differ by {difference}"
    print(f"logits of all contestants agree: largest difference {difference:.1e}")
    return difference


class Pass:
    """Forward and backward of one contestant, with its own loss and fresh gradients.

    `loss` gives what is minimised and its cross entropy, which the call returns.
    """

    def __init__(self, built: nn.Module, loss: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.built, self.loss = built, loss

    def __call__(self) -> float:
        self.built.zero_grad()
        loss, cross_entropy = self.loss()
        loss.backward()
        return cross_entropy.item()


def forward_backward(ours: dict, peers: dict, tokens_BS: Tensor, result: dict) -> dict:
    """Every contestant's pass, timed; returns those worth whole steps."""
    targets_BS = tokens_BS.roll(-1, 1)
    targets_BS[:, -1] = IGNORE

    def mine(forward: Callable) -> Callable[[], tuple[Tensor, Tensor]]:
        def loss() -> tuple[Tensor, Tensor]:
            sums = token_loss(forward(tokens_BS).logits, targets_BS)
            objective = (sums.cross_entropy + 1e-6 * sums.z) / sums.tokens
            return objective, sums.cross_entropy.detach() / sums.tokens

        return loss

    def theirs(built: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
        def loss() -> tuple[Tensor, Tensor]:
            value = built(tokens_BS, labels=tokens_BS, use_cache=False).loss
            return value, value.detach()

        return loss

    passes = {f"transformers {n}": Pass(built, theirs(built)) for n, built in peers.items()}
    config = ours["torch"].config
    needed = 12 * config.expert_width * config.width * config.router.top_k
    needed *= tokens_BS.numel() * len(config.moe_layers)
    if needed > MOST_BYTES:
        del passes["transformers batched_mm"]
        print(f"batched_mm's backward would hold {needed / 1e9:.0f} GB of weights: left out")
    for backend, built in ours.items():
        passes[backend] = Pass(built, mine(built))
    for backend, built in ours.items():
        whole = torch.compile(built.forward, dynamic=False, fullgraph=True)
        passes[f"{backend}, compiled"] = Pass(built, mine(whole))
        begun = time.perf_counter()
        passes[f"{backend}, compiled"]()
        result["compile_seconds"][f"{backend}, training"] = time.perf_counter() - begun
    result["loss_difference"] = losses_agree(passes)
    begun = time.perf_counter()  # seconds a pass: once is enough, and losses_agree warmed it
    passes.pop("transformers eager")()
    eager = time.perf_counter() - begun
    result["transformers_eager_ms"] = 1e3 * eager
    seconds = interleave(passes, result["repetitions"])
    table = speedups(seconds, fastest(seconds, "transformers"))
    show("forward and backward", table)
    print(f"  transformers eager, once: {1e3 * eager:.0f} ms")
    result["forward_backward"] = table
    return passes


def losses_agree(passes: dict) -> float:
    losses = [one() for one in passes.values()]
    difference = max(losses) - min(losses)
    assert difference <= TOLERANCE, f"cross entropies differ by {difference}"
    return difference


def whole_steps(passes: dict, ours: dict, repetitions: int, result: dict) -> None:
    """With clipping and the same fused AdamW on both sides; Muon's cost in a row of its own."""
    best = fastest(
        {n: [1 / row["median"]] for n, row in result["forward_backward"].items()},
        "transformers",
    )
    chosen = [best, *(name for name in passes if not name.startswith("transformers"))]
    optimizers = {
        id(passes[name].built): [
            torch.optim.AdamW(passes[name].built.parameters(), lr=1e-6, fused=True)
        ]
        for name in chosen
    }

    def step(one: Pass, every: list) -> Callable[[], None]:
        def work() -> None:
            one()
            torch.nn.utils.clip_grad_norm_(one.built.parameters(), 1.0)
            for optimizer in every:
                optimizer.step()

        return work

    steps = {name: step(passes[name], optimizers[id(passes[name].built)]) for name in chosen}
    muon = optim.build(ours["native"], optim.OptimConfig(muon_rate=1e-6, adamw_rate=1e-6))
    steps["native, compiled, Muon"] = step(passes["native, compiled"], muon)
    table = speedups(interleave(steps, repetitions), best)
    show("whole step: forward, backward, clipping, fused AdamW", table)
    result["whole_step"] = table


def balancing(built: Trinity, tokens_BS: Tensor, result: dict) -> None:
    """SMEBU's counting and update, as a share of the fastest whole step."""
    config = recipes.small().balance
    smebu = balancers.build(
        config,
        num_layers=len(built.config.moe_layers),
        num_experts=built.config.router.num_experts,
        top_k=built.config.router.top_k,
        vocab_size=built.config.vocab_size,
        seed=0,
    )
    with torch.no_grad():
        routing = built(tokens_BS).routing
    mask_T = torch.ones(tokens_BS.numel(), dtype=torch.bool)

    def work() -> None:
        smebu.update(smebu.observe(routing, mask_T))

    milliseconds = 1e3 * min(interleave({"smebu": work}, 20)["smebu"])
    share = milliseconds / min(r["milliseconds"] for r in result["whole_step"].values())
    print(f"\nSMEBU, counting and update: {milliseconds:.2f} ms, {share:.2%} of a step")
    result["smebu"] = {"milliseconds": milliseconds, "share_of_step": share}


def decoding(
    ours: dict, peers: dict, prompts_BS: Tensor, repetitions: int, result: dict
) -> None:
    """Greedy, cached, without the prefill; the same tokens from every contestant."""
    compiled = {backend: compiled_decode() for backend in ours}
    seconds: dict[str, list[float]] = {}
    drawn: dict[str, Tensor] = {}

    def record(name: str, tokens_BN: Tensor, since: float, repetition: int) -> None:
        if repetition >= 0:
            seconds.setdefault(name, []).append((time.perf_counter() - since) / NEW)
        elif name.endswith("compiled"):
            label = f"{name}, decoding {len(prompts_BS)}"
            result["compile_seconds"][label] = time.perf_counter() - since
        drawn[name] = tokens_BN

    for repetition in range(-1, repetitions):
        for name, built in peers.items():
            since, tokens_BN = decode_theirs(built, prompts_BS)
            record(f"transformers {name}", tokens_BN, since, repetition)
        for backend, built in ours.items():
            for name, step in ((backend, decode), (f"{backend}, compiled", compiled[backend])):
                since, tokens_BN = decode_ours(built, prompts_BS, step)
                record(name, tokens_BN, since, repetition)
    first = drawn["transformers grouped_mm"]
    assert all(torch.equal(first, tokens) for tokens in drawn.values()), "tokens differ"
    table = speedups(seconds, fastest(seconds, "transformers"))
    show(f"cached greedy decoding, batch {len(prompts_BS)}, a token", table)
    result[f"decoding_{len(prompts_BS)}"] = table


@torch.no_grad()
def decode_theirs(built: nn.Module, prompts_BS: Tensor) -> tuple[float, Tensor]:
    output = built(prompts_BS, use_cache=True)
    cache, drawn = output.past_key_values, [output.logits[:, -1].argmax(-1)]
    begun = time.perf_counter()
    for _ in range(NEW):
        output = built(drawn[-1].unsqueeze(1), past_key_values=cache, use_cache=True)
        drawn.append(output.logits[:, -1].argmax(-1))
    return begun, torch.stack(drawn, 1)


@torch.no_grad()
def decode_ours(built: Trinity, prompts_BS: Tensor, step: Callable) -> tuple[float, Tensor]:
    logits_BV, cache = prefill(built, prompts_BS, None, NEW)
    drawn = [logits_BV.argmax(-1)]
    begun = time.perf_counter()
    for _ in range(NEW):
        drawn.append(step(built, drawn[-1], cache).argmax(-1))
    return begun, torch.stack(drawn, 1)


if __name__ == "__main__":
    main()
