"""A cache that holds each prompt once, whatever the number of rows that continue it.

While prompts are read, every attention layer's keys and values are kept as its attention sees them
(whatever a model itself would cache: latents, shared layers). After `fork` a row is a completion,
and the model's cache holds the row's own tokens alone; attention reads both (`prefix_attention`).

All prompts of a cache have one length P and all rows one number L of tokens behind them, so a
sliding window or a chunk is a slice: the last keys that the mask lets a query see.

`PromptCache`              keeps the rows that stay active, and forgets the others
`PromptPlan`, `StepPlan`   what attention does while prompts are read, and at each further token
`ChainCache`               for chains, whose moves begin inside what was drawn before and may be
                           taken back: every row's keys and values are written to a store as they
                           come, and some rows at a time are taken out of it, cut to one length

G prompts, B rows, Hkv key heads, K size of a head, L tokens behind the prompt, T most of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from sharpen.scoring.hooks import AttentionOptions, LayerMask, Layers, SharingError, Watched
from sharpen_kernels.prefix_attention import PrefixRows, prefix_attention

ROOM = 16  # tokens a row has room for at first; doubled when it is full
# of a row's keys and values: of its state, of its proposal, and of what is being decoded
COPIES = 3


class PromptCache(Cache):
    """The `past_key_values` of prompts, and later of the rows that continue them.

    Forwards over the prompts go under `PromptPlan`, those over the rows under `StepPlan`.
    """

    layers: list["OwnLayer"]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self):
        super().__init__(layer_class_to_replicate=OwnLayer)
        # of the prompts, by the module that attends to them
        self.prompts: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.counts: list[int] = []
        self.rows: PrefixRows | None = None

    def remember(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Keep what `module` attends to while the prompts are read."""
        # contiguous: read at every step by one product for all heads
        self.prompts[module] = k.contiguous(), v.contiguous()

    def fork(self, counts: Sequence[int], device: torch.device) -> None:
        """From now on `counts[g]` rows continue prompt g, side by side in a batch."""
        if not self.prompts:
            raise SharingError("it keeps no keys and values of its layers")
        self.counts = list(counts)
        self.rows = PrefixRows.of(self.counts, device)
        for layer in self.layers:
            layer.is_forked = True

    def keep(self, active: Sequence[int]) -> None:
        """Continue these rows, a row as often as it is named; forget prompts without any.

        Args:
            active: Numbers of rows, all those of a prompt before those of the next.
        """
        assert self.rows is not None
        device = self.rows.place.device
        owner = [g for g, count in enumerate(self.counts) for _ in range(count)]
        left = [0] * len(self.counts)
        for row in active:
            left[owner[row]] += 1
        rows = torch.tensor(active, device=device)
        for layer in self.layers:
            layer.keep(rows)
        if not all(left):
            some = torch.tensor([g for g, count in enumerate(left) if count], device=device)
            for module, (k, v) in self.prompts.items():
                self.prompts[module] = k[some], v[some]
        self.counts = [count for count in left if count]
        self.rows = PrefixRows.of(self.counts, device)


class OwnLayer(DynamicLayer):
    """What one layer caches of each row alone; of the prompts only their length."""

    def __init__(self):
        super().__init__()
        self.is_forked = False
        self.P = 0
        self.L = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; the keys and values of the prompts, or, after `fork`, of the rows alone."""
        n = key_states.shape[2]
        if not self.is_forked:
            if self.P:
                raise SharingError("it reads a prompt in parts")
            self.P = n
            self.is_initialized = True
            return key_states, value_states
        if self.keys is None or self.values is None:
            keys, values = _room(key_states), _room(value_states)
        elif self.L + n > self.keys.shape[2]:
            keys, values = _wider(self.keys), _wider(self.values)
        else:
            keys, values = self.keys, self.values
        start, self.L = self.L, self.L + n
        keys[:, :, start : self.L] = key_states
        values[:, :, start : self.L] = value_states
        self.keys, self.values = keys, values
        return keys[:, :, : self.L], values[:, :, : self.L]

    def get_seq_length(self) -> int:
        """P + L."""
        return self.P + self.L

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next tokens see, and where the first of them stands."""
        return self.P + self.L + query_length, 0

    def keep(self, rows: Int64[Tensor, " B"]) -> None:
        """Continue these rows alone."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass(frozen=True, eq=False)
class PromptPlan:
    """Prompts are read as the model reads them, and their keys and values remembered."""

    cache: PromptCache

    def mask(self, layers: Layers) -> Watched:
        """See `ForwardPlan`."""
        return Watched(layers.own_mask(), self.cache.remember)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One more token of each row of a cache that is forked."""

    cache: PromptCache

    def mask(self, layers: Layers) -> LayerMask:
        """See `ForwardPlan`."""
        seen = self.cache.get_seq_length() + 1
        if (layers.n_query, layers.n_key) != (1, seen):
            raise SharingError(f"it attends from {layers.n_query} to {layers.n_key} of {seen}")
        zero, key_T = torch.tensor(0), torch.arange(seen)
        visible_T = layers.allows(zero, zero, torch.tensor(seen - 1), key_T).cpu().expand(seen)
        visible = int(visible_T.sum())
        if not visible_T[seen - visible :].all():
            raise SharingError("its mask is not a stretch of tokens that ends at the query")
        return StepMask(self.cache, seen, visible)


@dataclass(frozen=True, eq=False)
class StepMask(LayerMask):
    """The last `visible` of the `seen` tokens of each row, its prompt's among them."""

    cache: PromptCache
    seen: int
    visible: int

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `LayerMask`."""
        prompt_k, prompt_v = self.cache.prompts.get(module, (None, None))
        if prompt_k is None or prompt_v is None:
            raise SharingError("a layer attends that did not attend to the prompt")
        P, L = prompt_k.shape[2], k.shape[2]
        if q.shape[2] != 1 or self.seen != P + L:
            raise SharingError(f"{q.shape[2]} queries, {P} + {L} keys of {self.seen} tokens")
        assert self.cache.rows is not None
        own = min(L, self.visible)
        first = max(P - (self.visible - own), 0)
        out_BHK = prefix_attention(
            q[:, :, 0],
            prompt_k[:, :, first:],
            prompt_v[:, :, first:],
            k[:, :, L - own :],
            v[:, :, L - own :],
            self.cache.rows,
            softcap=options.softcap,
            sinks=options.sinks,
            scale=options.scale,
        )
        return out_BHK[:, None]


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
        """Continue these rows, after L of their tokens.

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
        """See `KeptLayer`."""
        for layer in self.kept:
            layer.begin()

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """See `KeptLayer`."""
        for layer in self.kept:
            layer.settle(is_taken)


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
        """Continue these rows, after L of their tokens."""
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
        """Take back what was written since `begin`, of the rows where it says not to."""
        if self.state is not None and self.store is not None:
            for kept, before in zip(self.store, self.state, strict=True):
                kept[~is_taken] = before[~is_taken]
        self.state = None

    def _empty(self, x: Tensor) -> Tensor:
        B, T = self.shape
        return x.new_empty(B, x.shape[1], T, x.shape[3])


def _room(x: Float[Tensor, "B Hkv n K"]) -> Float[Tensor, "B Hkv room K"]:
    B, H, n, K = x.shape
    return x.new_empty(B, H, max(n, ROOM), K)


def _wider(x: Float[Tensor, "B Hkv room K"]) -> Float[Tensor, "B Hkv wider K"]:
    return torch.cat([x, torch.empty_like(x)], dim=2)
