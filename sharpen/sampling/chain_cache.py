"""A cache of rows that are drawn again from places of their own: what a row keeps stays in it.

A `PromptCache` goes on with the rows that go on, and forgets the others. Chains come back: a move
begins inside what was drawn before, and may be taken back. So every row's keys and values are
written to a store as they come, and some rows at a time are taken out of it, cut to one length.

B rows, G prompts, Hkv key heads, K size of a head, L tokens behind the prompt, T most of them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from sharpen_kernels.prefix_attention import PrefixRows

from .prompt_cache import ROOM, OwnLayer, PromptCache

# of a row's keys and values: of its state, of its proposal, and of what is being decoded
COPIES = 3


class KeptLayer(OwnLayer):
    """An `OwnLayer` of some of B rows, all of which it keeps.

    Args:
        prompts: The layer that read the prompts.
        shape: B and T.
    """

    def __init__(self, prompts: OwnLayer, shape: tuple[int, int]):
        super().__init__()
        self.is_forked, self.is_initialized = True, prompts.is_initialized
        self.P, self.shape = prompts.P, shape
        self.rows = torch.zeros(0, dtype=torch.int64)
        # keys and values, each [B, Hkv, T, K]; of nothing that was not written is ever read
        self.store: tuple[Tensor, Tensor] | None = None
        self.state: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See `OwnLayer`; of the rows that were taken."""
        start = self.L
        found = super().update(key_states, value_states)
        if self.store is None:
            self.store = self._empty(key_states), self._empty(value_states)
        for kept, new in zip(self.store, (key_states, value_states), strict=True):
            kept[:, :, start : self.L].index_copy_(0, self.rows, new)
        return found

    def take(self, rows: Tensor, L: int) -> None:
        """Go on with these rows, after L of their tokens."""
        self.rows, self.L = rows, L
        self.keys = self.values = None
        if self.store is not None:
            self.keys, self.values = (x[:, :, : L + ROOM].index_select(0, rows) for x in self.store)

    def begin(self) -> None:
        """What is written from now on can be taken back."""
        self.state = self.store
        if self.state is not None:
            self.store = self.state[0].clone(), self.state[1].clone()

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """Take it back where it says not to."""
        if self.state is not None and self.store is not None:
            for kept, before in zip(self.store, self.state, strict=True):
                kept[~is_taken] = before[~is_taken]
        self.state = None

    def _empty(self, x: Tensor) -> Tensor:
        B, T = self.shape
        return x.new_empty(B, x.shape[1], T, x.shape[3])


class ChainCache(PromptCache):
    """The `past_key_values` of chains that continue prompts which were read.

    Args:
        read: Their cache; left as it is.
        counts: Chains of each prompt.
        T: Most tokens of a chain.
    """

    def __init__(self, read: PromptCache, counts: Sequence[int], T: int):
        super().__init__()
        self.every, self.some = read.prompts, list(range(len(counts)))
        self.prompts = dict(read.prompts)
        self.owner = [g for g, count in enumerate(counts) for _ in range(count)]
        self.kept = [KeptLayer(layer, (len(self.owner), T)) for layer in read.layers]
        self.layers = [*self.kept]

    def take(self, rows: Tensor, L: int) -> None:
        """Go on with these rows, after L of their tokens.

        Args:
            rows: Numbers of rows, in order.
            L: As many were written of each.
        """
        count = [0] * (max(self.owner) + 1)
        for row in rows.tolist():
            count[self.owner[row]] += 1
        some = [g for g, n in enumerate(count) if n]
        if some != self.some:
            at = torch.tensor(some, device=rows.device)
            self.prompts = {module: (k[at], v[at]) for module, (k, v) in self.every.items()}
        self.some, self.counts = some, [count[g] for g in some]
        self.rows = PrefixRows.of(self.counts, rows.device)
        for layer in self.kept:
            layer.take(rows, L)

    def begin(self) -> None:
        """What is written from now on can be taken back."""
        for layer in self.kept:
            layer.begin()

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """Take back what was written since `begin`, of the rows where it says not to."""
        for layer in self.kept:
            layer.settle(is_taken)
