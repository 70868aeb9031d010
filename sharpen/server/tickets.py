"""A ticket: the jobs of one request, and the promise of their statistics."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from sharpen_kernels import TokenStats


@dataclass(eq=False)
class Ticket:
    """The jobs of one request, and the promise of their statistics in the same order."""

    n_left: int
    results: list[TokenStats | None]
    future: "Future[list[TokenStats]]" = field(default_factory=Future)
    is_abandoned: bool = False

    def deliver(self, index: int, tokens: TokenStats) -> None:
        """One job is done."""
        self.results[index] = tokens
        self.n_left -= 1
        if self.n_left == 0:
            done = [x for x in self.results if x is not None]
            self._settle(lambda: self.future.set_result(done))

    def fail(self, error: Exception) -> None:
        """One job cannot be done, so the request cannot."""
        self.is_abandoned = True
        # a traceback would keep the tensors of the call alive
        self._settle(lambda: self.future.set_exception(error.with_traceback(None)))

    def _settle(self, act: Callable[[], None]) -> None:
        # told before, or nobody waits any more
        with contextlib.suppress(InvalidStateError):
            act()
