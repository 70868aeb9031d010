"""A clock that replays durations, for statistics of what was measured before."""

from collections.abc import Iterable, Iterator


class RecordedClock:
    """A clock that moves by the next recorded duration when told to."""

    def __init__(self):
        self.time = 0.0
        self.durations: Iterator[float] = iter(())

    def replay(self, durations: Iterable[float]):
        """Take these, in seconds, from the next call of `advance` on."""
        self.durations = iter(durations)

    def advance(self):
        """Move by the next of them."""
        self.time += next(self.durations)

    def now(self) -> float:
        """Seconds."""
        return self.time
