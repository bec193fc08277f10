"""What more experts cost: a pass of `small` with 16, 64 and 256 experts, 4 of them a token.

    python benchmarks/experts.py [repetitions] [threads]

Active parameters and tokens are equal, so that the work differs by the router alone, 6% from
16 to 256; the rest is the price of smaller products and of more weights to read. Contestants
take turns; a growth is of the fastest repetitions. The last line is one JSON object.
"""

import dataclasses
import json
import sys
from collections.abc import Callable

import torch
from _timing import interleave, product_rate, rounded

from trinity_lib import recipes
from trinity_lib.allocator import keep_memory
from trinity_lib.experts import use_backend
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity

ROWS, LENGTH, EXPERTS = 8, 256, (16, 64, 256)


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    allocator = keep_memory()
    passes = {
        (backend, experts): one_pass(experts, backend)
        for backend in ("native", "torch")
        for experts in EXPERTS
    }
    seconds = interleave({str(key): work for key, work in passes.items()}, repetitions)
    fastest = {key: min(seconds[str(key)]) for key in passes}
    table = {
        backend: {n: fastest[backend, n] / fastest[backend, EXPERTS[0]] for n in EXPERTS}
        for backend in ("native", "torch")
    }
    print("forward and backward, times that of 16 experts, and milliseconds")
    for (backend, n), value in fastest.items():
        print(f"  {backend:8} {n:4} experts  x {table[backend][n]:.2f}  {1e3 * value:8.1f} ms")
    print(
        json.dumps(
            rounded(
                {
                    "repetitions": repetitions,
                    "threads": torch.get_num_threads(),
                    "allocator": allocator,
                    "torch": torch.__version__,
                    "product_gflops": product_rate(),
                    "growth": table,
                }
            )
        )
    )


def one_pass(experts: int, backend: str) -> Callable[[], None]:
    config = recipes.small().model
    router = dataclasses.replace(config.router, num_experts=experts)
    with torch.device("meta"):
        model = Trinity(dataclasses.replace(config, router=router))
    model = model.to_empty(device="cpu")
    model.initialise(torch.Generator().manual_seed(0))
    use_backend(model, backend)
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator)

    def work() -> None:
        model.zero_grad()
        token_loss(model(tokens_BS).logits, tokens_BS.roll(-1, 1)).cross_entropy.backward()

    return work


if __name__ == "__main__":
    main()
