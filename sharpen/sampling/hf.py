"""Sample from any transformers causal LM: prompts read once, completions decoded on top of them.

`TransformersSampler`   plans batches, decodes each, and puts the samples of a prompt together
`DrawStep`              one token of every active row: raw logits in, tokens and log-probs kept

A model that decodes right on shared prompts (`decode.py`, tried once) reads each prompt once and
holds its keys and values once. Any other runs its own `generate`, where the token is chosen by a
logits processor that leaves no choice. Either way `DrawStep` sees the raw logits and keeps the
log-prob of what it draws. Near-ties (see `draw.py`) are settled on logits computed for the row
alone, which are the same bits in any batch.

In fp32 a prompt's tokens therefore do not depend on the batch they ran in, nor on the way; their
log-probs agree across batches to the model's own rounding, and are the same bits in a repeated
run. In half precision batches differ by more than a near-tie, and only repeated runs are the same.

B rows, A of them that are active, C that stay so, G prompts of P tokens, T most new tokens,
V vocabulary.
"""

import functools
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sharpen.errors import InputError, check_value
from sharpen.models import ModelLimits
from sharpen.scoring.model_access import evaluating
from sharpen.text import TextCodec

from .base import FinishReason, Prompt, Samples, SamplingConfig, Share, joined, plan_batches
from .decode import Decoding, crosses_rope_boundary, decode, find_decoding
from .draw import draw, row_key

logger = logging.getLogger(__name__)

SHARING = ("auto", "shared", "none")

RowResults = tuple[list[list[int]], list[list[float]], list[FinishReason]]


class TransformersSampler:
    """The `Sampler` of a transformers model.

    Args:
        model: A causal LM; used in eval mode, its own mode restored.
        tokenizer: To turn completions into text.
        max_tokens: Budget of one batch, of tokens whose keys and values are held: prompts and
            rows x max_new_tokens, or rows x (prompt + max_new_tokens) where nothing is shared.
        sharing: "auto" shares prompts where the model decodes right so; "shared" insists on it;
            "none" never does.

    Raises:
        InputError: If an option is not as above.
    """

    # keys and values that a row on a shared prompt holds for each of its tokens
    copies = 1

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int = 65536,
        sharing: str = "auto",
    ):
        if sharing not in SHARING:
            raise InputError(f"`sharing` must be one of {SHARING}, got {sharing!r}.")
        check_value("max_tokens", max_tokens, max_tokens >= 1, "at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.sharing = sharing
        self.limits = ModelLimits.of(model)
        self._codec = TextCodec(tokenizer, model.generation_config)
        self.eos_ids = self._codec.ends.stops

    @functools.cached_property
    def route(self) -> Decoding:
        """How this model decodes; found at first use by running it on a few random tokens.

        Raises:
            InputError: If sharing was asked for and the model does not decode right so.
        """
        name = type(self.model).__name__
        if self.sharing == "none":
            way, why = "generate", "it was asked for"
        else:
            way, why = find_decoding(self.model)
        if self.sharing == "shared" and way != "shared":
            raise InputError(
                f"`sharing` must be a way in which {name} decodes right, got 'shared' ({why}); "
                "leave it at 'auto'."
            )
        logger.info("%s decodes by %r: %s.", name, way, why)
        return way

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """Reject prompts that the model cannot read or continue.

        Raises:
            InputError: If a prompt is empty, holds an unknown id, or leaves no room for
                `max_new_tokens` within the model's context.
        """
        for prompt in prompts:
            self.limits.check(prompt.place, prompt.ids)
            limit = self.limits.max_length
            if limit is not None and len(prompt.ids) + config.max_new_tokens > limit:
                raise InputError(
                    f"{prompt.place}: prompt of {len(prompt.ids)} tokens + `max_new_tokens` "
                    f"{config.max_new_tokens} must fit the model's context of {limit}; "
                    "shorten the prompt or lower `max_new_tokens`."
                )

    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, *, done: Collection[str] = ()
    ) -> Iterator[list[Samples]]:
        """See `Sampler`. A batch in which any prompt is unfinished is run whole.

        Raises:
            InputError: As `check` does.
        """
        self.check(prompts, config)
        parts: list[Samples] = []
        for batch in self._plan(prompts, config):
            if all(prompts[share.prompt].id in done for share in batch):
                continue
            parts += self._run(prompts, batch, config)
            # the parts of a prompt that was split follow each other
            if batch[-1].stop < config.n:
                continue
            groups = itertools.groupby(parts, key=lambda part: part.prompt_id)
            yield [joined(list(group)) for prompt_id, group in groups if prompt_id not in done]
            parts = []

    def _plan(self, prompts: Sequence[Prompt], config: SamplingConfig) -> list[list[Share]]:
        """Which samples run together."""
        lengths, shared = [len(prompt.ids) for prompt in prompts], self.route == "shared"
        held = config.max_new_tokens * (self.copies if shared else 1)
        return plan_batches(lengths, config.n, held, self.max_tokens, shared=shared)

    def _run(
        self, prompts: Sequence[Prompt], batch: list[Share], config: SamplingConfig
    ) -> Sequence[Samples]:
        """The samples of each share of a batch."""
        prompts_GP, counts, keys_B = self._rows(prompts, batch, config)
        ids_BP = prompts_GP.repeat_interleave(torch.tensor(counts, device=keys_B.device), dim=0)
        step = DrawStep(self.model, ids_BP, keys_B, self.eos_ids, config)
        with torch.no_grad(), evaluating(self.model):
            if self._reads_once(prompts_GP.shape[1], config.max_new_tokens):
                decode(self.model, prompts_GP, counts, step)
            else:
                self._generate(ids_BP, step)
        return self._samples([prompts[share.prompt] for share in batch], counts, step.results())

    def _rows(
        self, prompts: Sequence[Prompt], batch: list[Share], config: SamplingConfig
    ) -> tuple[Int64[Tensor, "G P"], list[int], Int64[Tensor, " B"]]:
        """Of a batch: its prompts, the number of rows of each, and the key of each row."""
        keys = [
            row_key(config.seed, prompts[share.prompt].id, config.first + i)
            for share in batch
            for i in range(share.start, share.stop)
        ]
        device = self.model.device
        prompts_GP = torch.tensor([prompts[share.prompt].ids for share in batch], device=device)
        counts = [share.stop - share.start for share in batch]
        return prompts_GP, counts, torch.tensor(keys, device=device)

    def _reads_once(self, P: int, max_new_tokens: int) -> bool:
        """Whether the keys of a prompt of P tokens serve for all that follows it."""
        longest = P + max_new_tokens
        return self.route == "shared" and not crosses_rope_boundary(self.model, P, longest)

    def _generate(self, ids: Int64[Tensor, "B P"], step: "DrawStep") -> None:
        with _plain_generation(self.model):
            # pyright cannot see through the decorators of `generate`
            self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=step.config.max_new_tokens,
                    eos_token_id=list(self.eos_ids) or None,
                    pad_token_id=step.pad_id,
                ),
                logits_processor=LogitsProcessorList([_DrawnOnly(step)]),
            )

    def _samples(
        self, prompts: Sequence[Prompt], counts: Sequence[int], rows: RowResults
    ) -> list[Samples]:
        """`rows`, `counts[g]` of them for each prompt, with their text."""
        ends = list(itertools.accumulate(counts, initial=0))
        ids, logprobs, reasons = rows
        texts_of = self._codec.completion_texts
        return [
            Samples(
                prompt.id, texts_of(prompt.ids, ids[a:b]), ids[a:b], logprobs[a:b], reasons[a:b]
            )
            for prompt, (a, b) in zip(prompts, itertools.pairwise(ends), strict=True)
        ]


class DrawStep:
    """Chooses every row's token and remembers its raw log-prob.

    Args:
        model: Asked again, for one row alone, where a draw is a near-tie.
        prompts: Of each row, all of one length.
        keys: Of each row; see `draw.row_key`.
        eos_ids: A row ends when it draws one of these.
        config: How to draw.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Int64[Tensor, "B P"],
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
    ):
        self.model, self.prompts, self.keys, self.config = model, prompts, keys, config
        self.eos = torch.tensor(eos_ids, device=keys.device, dtype=torch.int64)
        # only ever seen behind the end of a row
        self.pad_id = eos_ids[0] if eos_ids else 0
        self.step = 0
        shape = len(keys), config.max_new_tokens
        self.token_BT = torch.zeros(shape, dtype=torch.int64, device=keys.device)
        self.logprob_BT = torch.zeros(shape, device=keys.device)
        self.count_B = torch.zeros_like(keys)
        self.is_open = torch.ones_like(keys, dtype=torch.bool)
        self.is_nan = torch.zeros_like(self.is_open)

    def __call__(
        self, rows: Int64[Tensor, " A"], scores: Float[Tensor, "A V"]
    ) -> tuple[Int64[Tensor, " A"], Int64[Tensor, " C"]]:
        """The token of each row, and which of `rows` stay active, by their place there.

        Args:
            rows: Numbers of the rows that `scores` are of.
            scores: Their raw logits.
        """
        logits_AV = scores.float()
        is_nan_A = logits_AV.isnan().any(dim=1) & self.is_open[rows]
        is_open_A = self.is_open[rows] & ~is_nan_A
        token_A = self._draw(rows, is_open_A, logits_AV)
        chosen_A = logits_AV.gather(1, token_A[:, None]).squeeze(1)
        self.token_BT[rows, self.step] = token_A
        self.logprob_BT[rows, self.step] = chosen_A - logits_AV.logsumexp(dim=1)
        self.count_B[rows] += is_open_A
        self.is_nan[rows] |= is_nan_A
        is_open_A = is_open_A & ~torch.isin(token_A, self.eos)
        self.is_open[rows] = is_open_A
        self.step += 1
        # a row of NaN has no end of its own
        token_A = torch.where(self.is_nan[rows], self.pad_id, token_A)
        is_active_A = is_open_A & (self.step < self.config.max_new_tokens)
        return token_A, is_active_A.nonzero().flatten()

    def _draw(
        self, rows: Int64[Tensor, " A"], is_open: Bool[Tensor, " A"], logits: Float32[Tensor, "A V"]
    ) -> Int64[Tensor, " A"]:
        """A token of each row; near-ties of fp32 are drawn from logits of the row alone."""
        how = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        keys_A = self.keys[rows]
        drawn = draw(logits, keys_A, self.step, **how)
        token_A = drawn.token
        if self.model.dtype == torch.float32:
            for i in (drawn.is_near_tie & is_open).nonzero().flatten().tolist():
                row = int(rows[i])
                ids = torch.cat([self.prompts[row], self.token_BT[row, : self.step]])
                last = self.model(input_ids=ids[None], use_cache=False).logits[:, -1].float()
                token_A[i] = draw(last, keys_A[i : i + 1], self.step, **how).token[0]
        return token_A

    def results(self) -> RowResults:
        """Ids, log-probs and finish reason of every row."""
        return row_results(self.token_BT, self.logprob_BT, self.count_B, self.is_open, self.is_nan)


def row_results(
    token: Int64[Tensor, "B T"],
    logprob: Float32[Tensor, "B T"],
    count: Int64[Tensor, " B"],
    is_open: Bool[Tensor, " B"],
    is_nan: Bool[Tensor, " B"],
) -> RowResults:
    """The first `count` ids and log-probs of every row, and its finish reason."""
    counts = count.tolist()
    reasons: list[FinishReason] = [
        "nan" if nan else "length" if open_ else "stop"
        for nan, open_ in zip(is_nan.tolist(), is_open.tolist(), strict=True)
    ]
    ids = [row[:n] for row, n in zip(token.tolist(), counts, strict=True)]
    logprobs = [row[:n] for row, n in zip(logprob.tolist(), counts, strict=True)]
    return ids, logprobs, reasons


class _DrawnOnly(LogitsProcessor):
    """A step inside `generate`: scores that leave one choice, the drawn token."""

    def __init__(self, step: DrawStep):
        self.step = step
        self.rows = torch.arange(len(step.keys), device=step.keys.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, _ = self.step(self.rows, scores)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Keep a checkpoint's penalties and suppressed tokens out of the distribution.

    `generate` fills every option that a call leaves open from `model.generation_config`.
    """
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs
