"""Progress of a long loop: a bar in a terminal, one line every so often elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

PATIENCE = 2.0
"""Seconds before a loop says anything."""
LINE_SECONDS = 10.0
"""Seconds between its lines where there is no terminal."""

Item = TypeVar("Item")


def counted(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """The same items; a loop over them that takes more than two seconds says how far it is."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit=unit, delay=PATIENCE)
        return
    total = f" of {len(items)}" if isinstance(items, list | tuple) else ""
    due = time.monotonic() + PATIENCE
    for count, item in enumerate(items):
        if time.monotonic() > due:
            print(f"{what}: {count:,}{total} {unit}s", flush=True)
            due = time.monotonic() + LINE_SECONDS
        yield item


class Progress:
    """Counts steps; call `step` after each, `note` for what should stay on the screen."""

    def __init__(
        self,
        total: int,
        every: int,
        name: str,
        done: int = 0,
        unit: str = "step",
        *,
        silent: bool = False,
    ) -> None:
        self.unit, self.silent = unit, silent
        self.total, self.every, self.done, self.before = total, every, done, done
        self.begun = time.monotonic()
        terminal = sys.stderr.isatty() and not silent
        self.bar = tqdm(total=total, desc=name, unit=unit, initial=done) if terminal else None
        if self.bar is None and not silent:
            begun = f", from {unit} {done}" if done else ""
            print(f"{name}: {total} {unit}s{begun}", flush=True)

    @property
    def seconds(self) -> float:
        """Since the loop began."""
        return time.monotonic() - self.begun

    def step(self, *facts: str) -> None:
        """One step is done; `facts` describe it."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(facts), refresh=False)
            self.bar.update()
        elif not self.silent and (self.done % self.every == 0 or self.done == self.total):
            pace = self.seconds / (self.done - self.before)
            left = pace * (self.total - self.done)
            count = f"{self.unit} {self.done:>{len(str(self.total))}}/{self.total}"
            print(
                count,
                *facts,
                f"{pace:.2f} s/{self.unit}",
                f"{left:.0f} s left",
                sep="  ",
                flush=True,
            )

    def note(self, text: str) -> None:
        """Print a line that stays."""
        line = f"  validation, nats per token: {text}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif not self.silent:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
