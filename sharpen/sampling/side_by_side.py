"""Slow calls side by side, each result as soon as it is there."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], n: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """(item, result or error) of each item, in the order in which they finish; n run at a time.

    The next item is taken when a place is free, in the caller's thread, so an iterable that ends
    early stops the rest. Threads do not keep the program alive.

    Example:
        >>> sorted(side_by_side(lambda x: x * x, [3, 4], n=2))
        [(3, 9), (4, 16)]
    """
    finished: queue.SimpleQueue[tuple[Item, Result | Exception]] = queue.SimpleQueue()

    def run(item: Item) -> None:
        try:
            finished.put((item, work(item)))
        # whatever it is, it is the caller's to judge
        except Exception as error:
            finished.put((item, error))

    waiting = iter(items)
    running = 0
    while True:
        for item in itertools.islice(waiting, n - running):
            threading.Thread(target=run, args=(item,), daemon=True).start()
            running += 1
        if not running:
            return
        yield finished.get()
        running -= 1
