"""Progress of a long loop: a bar in a terminal, one line every so often elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts steps; call `step` after each, `note` for what should stay on the screen."""

    def __init__(self, total: int, every: int, name: str) -> None:
        self.total, self.every, self.done = total, every, 0
        self.begun = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=name, unit="step") if terminal else None
        if self.bar is None:
            print(f"{name}: {total} steps", flush=True)

    def step(self, *facts: str) -> None:
        """One step is done; `facts` describe it."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(facts), refresh=False)
            self.bar.update()
        elif self.done % self.every == 0 or self.done == self.total:
            pace = (time.monotonic() - self.begun) / self.done
            left = pace * (self.total - self.done)
            count = f"step {self.done:>{len(str(self.total))}}/{self.total}"
            print(
                count, *facts, f"{pace:.2f} s/step", f"{left:.0f} s left", sep="  ", flush=True
            )

    def note(self, text: str) -> None:
        """Print a line that stays."""
        line = f"  validation, nats per token: {text}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
