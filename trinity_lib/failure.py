"""How the ranks of a run failed: which failure began the others, and a sentence on it."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trinity_lib.config import Refusal

STUBBORN_SECONDS = 10
"""For ranks that are told to end, before torchrun kills them."""
OTHERS_FAULT = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "gloo/transport",
    "Connection was likely closed",
    "DistNetworkError",
    "DistStoreError",
    "remote process exited",
    "ncclRemoteError",
    "collective operation timeout",
)
"""What a rank says when another is gone."""


class RanksFailed(Refusal, RuntimeError):
    """A run of several processes failed: the rank that began it, and why."""


class Failure(NamedTuple):
    """How one rank ended."""

    rank: int
    exitcode: int
    """Its exit code; a signal's number with a minus where one ended it."""
    said: str
    """Type and message of the exception it raised; empty where it could not say."""
    refusal: str
    """The sentence, where that was a Refusal."""
    at: float
    """When, in seconds since the epoch."""


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that began the others: one by a signal, then a refusal, then the earliest.

    A rank that lost its connection to another, or was told to end, is a victim.
    """
    first = min(failure.at for failure in failures)

    def weight(failure: Failure) -> tuple[int, float]:
        by = -failure.exitcode
        told = by == signal.SIGKILL and failure.at - first > STUBBORN_SECONDS / 2
        if any(words in failure.said for words in OTHERS_FAULT):
            return 3, failure.at
        if failure.said:  # whatever ended it afterwards
            return (1 if failure.refusal else 2), failure.at
        if by == signal.SIGTERM or told:
            return 4, failure.at
        if by <= 0 or by == signal.SIGABRT:  # libraries abort when a peer is gone
            return 2, failure.at
        return 0, failure.at

    return min(failures, key=weight)


def sentence(failure: Failure, log: Path) -> str:
    """One sentence on how a rank failed; `log` is the file of what it said."""
    who, where = f"rank {failure.rank}", f"its log is {log}."
    if failure.refusal:
        return failure.refusal
    if failure.said:
        return f"{who} failed: {failure.said.strip().splitlines()[0].rstrip('.')}; {where}"
    return unsaid(who, failure.exitcode, log)


def unsaid(who: str, exitcode: int, log: Path) -> str:
    """On a process that could not say itself what ended it."""
    if exitcode == -signal.SIGKILL:
        return f"{who} was killed (SIGKILL), probably out of memory; its log is {log}."
    if exitcode < 0:
        names = {s.value: s.name for s in signal.Signals}
        by = names.get(-exitcode, f"signal {-exitcode}")
        return f"{who} was ended by {by}; its log is {log}."
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ends = " / ".join(lines[-3:]).rstrip(".") or "without a word"
    return f"{who} ended with exit code {exitcode}; its log is {log}, which ends: {ends}."
