"""Statistics of every completion token of many pairs, batch by batch, in input order.

    pairs -> batches -> one forward each -> rows that predict -> statistics -> input order

Three ways to share what sequences have in common:

    tree    one packed row per batch, every shared token once    `packing`, `hooks`
    cache   the prompt into a cache, completions in batches      `batching`
    none    every sequence whole, in padded batches              `batching`

Sequences that share nothing are packed by "tree" as well, side by side in one row. And two paths
from a forward to statistics, one contract:

    HiddenPath   hidden rows x head in `linear_logprob`; never a tensor of size [R, V]
    LogitsPath   the model's own logits, of one batch at a time, of a smaller budget

S scored tokens, R rows that predict them, B sequences, L padded length, T packed tokens, D hidden,
V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import InputError, SharpenError, check_value
from sharpen_kernels import TokenStats, linear_logprob, token_logprob
from sharpen_kernels.stats import NAMES, Statistic

from .batching import (
    Batch,
    DetachedInputs,
    PredictorBatch,
    continuations,
    groups_of,
    inverse_of,
    make_batches,
    read_prompt,
)
from .hooks import SharingError, TreePlan, under
from .model_access import (
    Head,
    accepted,
    backbone_of,
    forward_is,
    hidden_states,
    input_device,
    logits_budget,
    output_layer,
    rope_boundary,
)
from .packing import PackedRow, plan
from .pairs import Pair, token_starts

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

# "alone": as "none", with each sequence in a batch of its own; found by the probe, never asked for
Sharing = Literal["tree", "cache", "none", "alone"]
WAYS: tuple[Sharing, ...] = ("tree", "cache", "none")
Found = TypeVar("Found")


def token_stats(
    path: "ScoringPath",
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    stats: Sequence[Statistic],
    sharing: Sharing = "none",
    pack_unshared: bool = True,
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics of all completion tokens of `pairs`, end to end; differentiable in the model.

    Args:
        path: From the model, in the mode that it is in, to statistics.
        pairs: Prompt and completion ids; the prompt has at least one.
        max_tokens: Budget of one batch, in tokens, padding included.
        stats: Which statistics; see `TokenStats`.
        sharing: How completions of one prompt share it; `find_sharing` says what a model can.
        pack_unshared: Whether "tree" packs pairs that share nothing, or reads them whole.
        temperature: Divides the model's logits.
    """
    parts, places = [], []
    batches = predictor_batches(
        path, pairs, path.budget(max_tokens), sharing, pack_unshared=pack_unshared
    )
    for batch in batches:
        places.append(batch.output_index)
        parts.append(path.stats(batch, stats, temperature))
    if not parts:
        nothing = torch.zeros(0, 1, device=input_device(path.model))
        return token_logprob(nothing, nothing[:, 0].long(), stats=stats)
    inverse_S = inverse_of(places)
    columns = {}
    for name in stats:
        column_S = torch.cat([getattr(part, name) for part in parts])
        columns[name] = column_S[inverse_S.to(column_S.device)]
    return TokenStats(**columns)


def shared_or_whole(run: Callable[[Sharing], Found], sharing: Sharing) -> Found:
    """What `run` gives by `sharing`, or by whole sequences where the model cannot share now.

    Not met by the probe: dropout, checkpointing, a layer that long inputs alone reach.
    """
    try:
        return run(sharing)
    except SharingError as error:
        logger.warning("whole sequences instead of shared prompts: %s", error)
        return run("none")


def predictor_batches(
    path: "ScoringPath",
    pairs: Sequence[Pair],
    max_tokens: int,
    sharing: Sharing,
    *,
    pack_unshared: bool = True,
    cut_prompts: bool = False,
) -> Iterator[PredictorBatch]:
    """Batches that together predict every completion token of `pairs` once; see `token_stats`.

    `cut_prompts` detaches what follows a cached prompt from its graph; what it gathers goes back
    through the prompt after the last of its batches.
    """
    chosen = None
    if sharing == "alone":
        max_tokens = 1
    boundary, device = rope_boundary(path.model), input_device(path.model)
    if sharing == "tree":
        rows = plan(pairs, max_tokens, boundary=boundary)
        if pack_unshared or rows.shares:
            for row in rows:
                yield path.predict(row.to(device))
            return
    if sharing == "cache":
        groups, chosen = groups_of(pairs, boundary)
        starts = token_starts(pairs)
        for group in groups:
            cache, last_D = read_prompt(path.module, pairs[group[0]][0], device)
            inputs = DetachedInputs()
            if cut_prompts:
                cache, last_D = inputs.detach_cache(cache), inputs.detach(last_D)
            yield from continuations(path.module, cache, last_D, pairs, group, starts, max_tokens)
            inputs.backward()
            # not held while the next prompt, or whole sequences, are read
            del cache, last_D, inputs
    for batch in make_batches(pairs, max_tokens, chosen=chosen, boundary=boundary):
        yield path.predict(batch.to(device))


class HiddenPath:
    """Hidden rows of the backbone, projected and reduced in `linear_logprob`.

    Backbone and weight are taken from the model at each call, so they may be trained or replaced
    between two calls. Nothing of size [R, V] is held.

    Args:
        model: Run in the mode it is in.
        head: How to read its logits off hidden rows.
    """

    def __init__(self, model: "transformers.PreTrainedModel", head: Head):
        self.model, self.head = model, head

    @property
    def module(self) -> nn.Module:
        """What a forward runs."""
        backbone = backbone_of(self.model)
        assert backbone is not None, "checked when the route was chosen"
        return backbone

    def budget(self, max_tokens: int) -> int:
        """Tokens of one batch."""
        return max_tokens

    def predict(self, batch: PackedRow | Batch) -> PredictorBatch:
        """One forward of a batch that is where the model is; differentiable."""
        return _predictors(batch, hidden_rows(self.model, batch))

    def stats(
        self, batch: PredictorBatch, stats: Sequence[Statistic], temperature: float = 1.0
    ) -> TokenStats:
        """Statistics of the scored tokens of a batch."""
        layer = output_layer(self.model)
        assert layer is not None, "checked when the route was chosen"
        return self._stats(layer, batch, stats, temperature)

    def logprob_in_call(self, batch: PredictorBatch) -> Float[Tensor, " S"]:
        """Log-probs, read while the head is called: FSDP holds its whole weight only then."""
        layer = self.model.get_output_embeddings()
        assert isinstance(layer, nn.Linear), "checked when the route was chosen"

        def forward(hidden_RD: Tensor) -> Tensor:
            found = self._stats(layer, batch._replace(rows=hidden_RD), ("logprob",)).logprob
            assert found is not None
            return found

        with forward_is(layer, forward):
            return layer(batch.rows)

    def _stats(
        self,
        layer: nn.Linear,
        batch: PredictorBatch,
        stats: Sequence[Statistic],
        temperature: float = 1.0,
    ) -> TokenStats:
        device = layer.weight.device
        return linear_logprob(
            batch.rows.to(device),
            layer.weight,
            batch.target.to(device),
            rows=None if batch.row_index is None else batch.row_index.to(device),
            bias=layer.bias,
            temperature=self.head.temperature * temperature,
            softcap=self.head.softcap,
            stats=stats,
        )


class LogitsPath:
    """The model's own logits, reduced in `token_logprob`: right for any head, in small batches.

    Args:
        model: Run in the mode it is in.
    """

    def __init__(self, model: "transformers.PreTrainedModel"):
        self.model = model

    @property
    def module(self) -> nn.Module:
        """What a forward runs."""
        return self.model

    def budget(self, max_tokens: int) -> int:
        """Tokens of one batch."""
        return logits_budget(self.model, max_tokens)

    def predict(self, batch: PackedRow | Batch) -> PredictorBatch:
        """One forward of a batch that is where the model is; differentiable."""
        return _predictors(batch, logit_rows(self.model, batch))

    def stats(
        self, batch: PredictorBatch, stats: Sequence[Statistic], temperature: float = 1.0
    ) -> TokenStats:
        """Statistics of the scored tokens of a batch."""
        device = batch.rows.device
        return token_logprob(
            batch.rows,
            batch.target.to(device),
            rows=None if batch.row_index is None else batch.row_index.to(device),
            temperature=temperature,
            stats=stats,
        )

    def logprob_in_call(self, batch: PredictorBatch) -> Float[Tensor, " S"]:
        """Log-probs of logits, for which the head was called."""
        found = self.stats(batch, ("logprob",)).logprob
        assert found is not None
        return found


ScoringPath = HiddenPath | LogitsPath


def scoring_path(model: "transformers.PreTrainedModel", head: Head | None) -> ScoringPath:
    """The path of a model whose head is read so, or not read."""
    return LogitsPath(model) if head is None else HiddenPath(model, head)


def _predictors(batch: PackedRow | Batch, rows: Tensor) -> PredictorBatch:
    row_index = batch.rows if isinstance(batch, PackedRow) else None
    return PredictorBatch(rows, row_index, batch.target, batch.output_index)


def hidden_rows(
    model: "transformers.PreTrainedModel", batch: PackedRow | Batch
) -> Float[Tensor, "R D"]:
    """The hidden rows that predict, as the backbone hands them to the head; differentiable.

    Those of `batch.source` in a packed row, for which the hooks must be installed; else one for
    each scored token.
    """
    if isinstance(batch, PackedRow):
        backbone = backbone_of(model)
        assert backbone is not None, "checked when the route was chosen"
        hidden_TD: Tensor = _run_packed(backbone, batch).last_hidden_state[0]
        return hidden_TD[batch.source.to(hidden_TD.device)]
    hidden_BLD = hidden_states(model, batch.ids, batch.mask)
    assert hidden_BLD is not None, "checked when the route was chosen"
    return hidden_BLD.flatten(0, 1)[batch.rows.to(hidden_BLD.device)]


def logit_rows(
    model: "transformers.PreTrainedModel", batch: PackedRow | Batch
) -> Float[Tensor, "R V"]:
    """The logits that predict, as the model computes them; differentiable. As `hidden_rows`.

    If the model can be told which columns to project it allocates [R, V] in a packed row, else
    [B, K, V] where K columns span those that predict; if not, the logits of every token.

    Raises:
        SharpenError: If the model returns logits for some other number of tokens.
    """
    if isinstance(batch, PackedRow):
        T, R = len(batch.ids), len(batch.source)
        logits_KV: Tensor = _run_packed(model, batch, logits_to_keep=batch.source).logits[0]
        if len(logits_KV) not in (T, R):
            raise SharpenError(
                f"{type(model).__name__} must return logits for {R} or {T} tokens, "
                f"got {len(logits_KV)}."
            )
        return logits_KV if len(logits_KV) == R else logits_KV[batch.source.to(logits_KV.device)]
    L = batch.ids.shape[1]
    column_S = batch.rows % L
    first, last = int(column_S.min()), int(column_S.max())
    keep_K = torch.arange(first, last + 1, device=batch.ids.device)
    asked = accepted(model, use_cache=False, logits_to_keep=keep_K)
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, **asked).logits
    if logits.shape[1] not in (L, len(keep_K)):
        raise SharpenError(
            f"{type(model).__name__} must return logits for {L} columns, got {logits.shape[1]}; "
            "adapters that insert tokens cannot be scored."
        )
    if logits.shape[1] == L:
        logits = logits[:, first : last + 1]
    K = logits.shape[1]
    row_S = batch.rows // L * K + column_S - first
    return logits.flatten(0, 1)[row_S.to(logits.device)]


# what a module of transformers returns
def _run_packed(module: nn.Module, row: PackedRow, **options: Tensor) -> Any:
    asked = accepted(
        module,
        input_ids=row.ids[None],
        # ones: without a mask transformers reads sequences off the positions
        attention_mask=torch.ones_like(row.ids)[None],
        position_ids=row.tree.position[None],
        use_cache=False,
        **options,
    )
    with under(TreePlan(row.tree)):
        return module(**asked)


def check_stats(stats: Sequence[str]) -> tuple[Statistic, ...]:
    """The statistics to compute: the log-prob and `stats`, each once; InputError if unknown."""
    unknown = [name for name in stats if name not in NAMES]
    if unknown:
        raise InputError(f"`stats` must be of {', '.join(NAMES)}, got {unknown[0]!r}.")
    return tuple(dict.fromkeys(cast(Sequence[Statistic], ["logprob", *stats])))


def check_temperature(temperature: float) -> None:
    """Reject what logits cannot be divided by."""
    check_value("temperature", temperature, 0 < temperature < math.inf, "above 0 and finite")
