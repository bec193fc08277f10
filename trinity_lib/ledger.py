"""What operators would allocate, compute and send, entered as they are dispatched.

A `Ledger` follows the storages of fake tensors from operator to operator: what is alive, of
which kind, when. torch's own `FSDPMemTracker` takes a snapshot of every module at every
operator, 400 s for the 60 layers of Large where this takes 20; on small models a test holds
the two together.
"""

import functools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

LINE_SECONDS = 5.0
"""Between two lines on how far a trace is."""
IDLE = ("prim", "profiler")
"""Namespaces of operators that neither allocate nor compute."""


class Collective(NamedTuple):
    """One kind of collective over groups of one size."""

    kind: str
    ranks: int


class Traffic(NamedTuple):
    """What a rank moves in such collectives."""

    calls: int
    bytes: int
    """The whole buffer: what all-gather yields, reduce-scatter and all-reduce take, and
    all-to-all sends."""
    sent: int
    """What leaves this rank, by ring algorithms."""


class _Entry(NamedTuple):
    storage: weakref.ref
    number: int
    size: int


class Ledger(TorchDispatchMode):
    """Enters what is dispatched while it is active; then asked for peaks and sums.

    `formulas` give the FLOP of operators that torch's flop counter does not know, and
    `workspaces` the bytes that an operator allocates and frees within itself.
    """

    def __init__(
        self,
        formulas: Mapping[Any, Callable[..., int]],
        workspaces: Mapping[Any, Callable[..., int]],
        say: Callable[[str], object],
    ) -> None:
        super().__init__()
        self.phase = self.default = ""
        """Under what FLOP and traffic are entered; the kind of what has no other."""
        self.kinds: list[str] = []
        """Of every storage, by its number."""
        self.flops: Counter[tuple[str, Any]] = Counter()
        """By phase and operator."""
        self.traffic: dict[tuple[str, Collective], Traffic] = {}
        """By phase and kind of collective."""
        self.rules: dict[Any, Callable[..., None]] = {}
        """By operator: given its result and arguments, to say of which kind its tensors are."""
        self._formulas = {**flop_registry, **formulas}
        self._workspaces, self._say = workspaces, say
        self._live: dict[int, _Entry] = {}
        self._events: list[tuple[int, int]] = []
        self._begun = self._said = time.monotonic()
        self.operators = 0
        """How many were dispatched."""
        self._mode: Any = None
        self._resize: Any = None

    def __enter__(self) -> "Ledger":
        self._mode, self._resize = active_fake_mode(), torch.UntypedStorage.resize_

        @functools.wraps(self._resize)
        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = self._resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and enter it, but not those that DTensor plans with."""
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace in IDLE or active_fake_mode() is not self._mode:
            return result
        packet = func._overloadpacket
        if formula := self._formulas.get(packet):
            self.flops[self.phase, packet] += formula(*args, **kwargs, out_val=result)
        if workspace := self._workspaces.get(packet):
            size = workspace(*args)
            self.kinds.append(self.default)
            number = len(self.kinds) - 1
            self._events += [(size, number), (-size, number)]
        if move := _MOVES.get(packet):
            self._move(*move(*args))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self.enter(each)
        if rule := self.rules.get(packet):
            rule(result, *args, **kwargs)
        self._progress()
        return result

    def enter(self, tensor: Tensor, kind: str = "") -> None:
        """Enter a tensor's storage, or say of which kind it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._live.get(key)
        if entry is not None:
            if kind:
                self.kinds[entry.number] = kind
            return
        number, size = len(self.kinds), storage.nbytes()
        self.kinds.append(kind or self.default)
        gone = weakref.ref(storage, functools.partial(self._gone, key))
        self._live[key] = _Entry(gone, number, size)
        self._events.append((size, number))

    def enter_all(self, tensors: Iterable[Any], kind: str) -> None:
        """`enter` for many; what is no tensor is left out."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.enter(tensor, kind)

    def rename(self, old: tuple[str, ...], new: str) -> None:
        """Give what is alive and of an `old` kind a `new` one."""
        for entry in self._live.values():
            if self.kinds[entry.number] in old:
                self.kinds[entry.number] = new

    @property
    def now(self) -> int:
        """The moment, to ask for a peak from or to."""
        return len(self._events)

    def peak(self, first: int, last: int) -> dict[str, int]:
        """Bytes by kind where most was alive between two moments."""
        deltas = np.array([delta for delta, _ in self._events[:last]], dtype=np.int64)
        totals = deltas.cumsum()
        at = first - 1 + int(totals[first - 1 :].argmax()) if first else int(totals.argmax())
        found: Counter[str] = Counter()
        for delta, number in self._events[: at + 1]:
            found[self.kinds[number]] += delta
        return dict(found)

    def _gone(self, key: int, _: weakref.ref) -> None:
        entry = self._live.pop(key)
        self._events.append((-entry.size, entry.number))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._live.get(storage._cdata)
        if entry is not None and entry.size != storage.nbytes():
            self._events.append((storage.nbytes() - entry.size, entry.number))
            self._live[storage._cdata] = entry._replace(size=storage.nbytes())

    def _move(self, kind: str, group: Any, size: int, sent: float | None = None) -> None:
        ranks = ProcessGroup.unbox(group).size()
        sent = size * _SHARE[kind] * (ranks - 1) / ranks if sent is None else sent
        key = self.phase, Collective(kind, ranks)
        before = self.traffic.get(key, Traffic(0, 0, 0))
        self.traffic[key] = Traffic(
            before.calls + 1, before.bytes + size, before.sent + round(sent)
        )

    def _progress(self) -> None:
        self.operators += 1
        now = time.monotonic()
        if now - self._said > LINE_SECONDS:
            self._said = now
            seconds = now - self._begun
            self._say(f"  {self.phase}: {self.operators:,} operators, {seconds:.0f} s")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_to_all(
    output: Tensor, given: Tensor, group: Any, _: Any, splits: list[int], *rest: Any
) -> tuple[str, Any, int, float]:
    """What goes to other ranks, by the sizes of the pieces."""
    unboxed, size = ProcessGroup.unbox(group), _bytes(given)
    if not splits:
        return "all-to-all", group, size, size * (1 - 1 / unboxed.size())
    own = splits[unboxed.rank()] / max(1, sum(splits))
    return "all-to-all", group, size, size * (1 - own)


_SHARE = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}
"""How often a ring algorithm sends the others' part of the buffer."""
_C10D = torch.ops.c10d
_MOVES: dict[Any, Callable[..., tuple]] = {
    _C10D._allgather_base_: lambda y, x, group, *_: ("all-gather", group, _bytes(y)),
    _C10D._reduce_scatter_base_: lambda y, x, group, *_: ("reduce-scatter", group, _bytes(x)),
    _C10D.allreduce_: lambda xs, group, *_: ("all-reduce", group, sum(map(_bytes, xs))),
    _C10D.alltoall_base_: _all_to_all,
}
"""Collectives, each with what it moves: kind, group, bytes, and bytes sent if not the usual."""
