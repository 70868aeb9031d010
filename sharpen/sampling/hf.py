"""Sample from any transformers causal LM through its own `generate`.

`generate` runs the model and its cache; the token is chosen by `DrawStep`, a logits processor
that sees the raw logits, keeps the log-prob of what it draws, and leaves `generate` no choice.
Near-ties (see `draw.py`) are settled on logits computed for the row alone, which are the same
bits in any batch.

In fp32 a prompt's tokens therefore do not depend on the batch they ran in; their log-probs
agree across batches to the model's own rounding, and are the same bits in a repeated run. In
half precision batches differ by more than a near-tie, and only repeated runs are the same.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sharpen.errors import InputError
from sharpen.limits import ModelLimits
from sharpen.scoring.forward import evaluating

from .draw import row_key
from .draw_step import DrawStep
from .plan import Share, plan_batches
from .protocol import FinishReason, Prompt, Samples, SamplingConfig


class TransformersSampler:
    """The `Sampler` of a transformers model.

    Args:
        model: A causal LM; used in eval mode, its own mode restored.
        tokenizer: To turn completions into text.
        max_tokens: Budget of one batch: rows x (prompt + max_new_tokens).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int = 65536,
    ):
        if max_tokens < 1:
            raise InputError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.limits = ModelLimits.of(model)
        self.eos_ids = _eos_ids(model, tokenizer)

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """Refuse prompts that the model cannot read or continue.

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
        lengths = [len(prompt.ids) for prompt in prompts]
        parts: list[_Rows] = []
        for batch in plan_batches(lengths, config.n, config.max_new_tokens, self.max_tokens):
            if all(prompts[share.prompt].id in done for share in batch):
                continue
            rows = self._run(prompts, batch, config)
            parts.append(rows)
            # the parts of a prompt that was split follow each other
            if batch[-1].stop < config.n:
                continue
            finished = self._collect(prompts, parts, config.n)
            parts = []
            yield [samples for samples in finished if samples.prompt_id not in done]

    def _run(
        self, prompts: Sequence[Prompt], batch: list[Share], config: SamplingConfig
    ) -> "_Rows":
        rows = [(share.prompt, i) for share in batch for i in range(share.start, share.stop)]
        device = self.model.device
        ids = torch.tensor([prompts[p].ids for p, _ in rows], device=device)
        keys = [row_key(config.seed, prompts[p].id, i) for p, i in rows]
        step = DrawStep(self.model, torch.tensor(keys, device=device), self.eos_ids, config)
        with torch.no_grad(), evaluating(self.model), _plain_generation(self.model):
            # pyright cannot see through the decorators of `generate`
            self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=config.max_new_tokens,
                    eos_token_id=list(self.eos_ids) or None,
                    pad_token_id=step.pad_id,
                ),
                logits_processor=LogitsProcessorList([step]),
            )
        return _Rows([p for p, _ in rows], *step.results())

    def _collect(self, prompts: Sequence[Prompt], parts: "list[_Rows]", n: int) -> list[Samples]:
        owner = [p for rows in parts for p in rows.prompt]
        ids = [x for rows in parts for x in rows.ids]
        logprobs = [x for rows in parts for x in rows.logprobs]
        reasons: list[FinishReason] = [x for rows in parts for x in rows.reasons]
        finished = []
        for start in range(0, len(owner), n):
            span = slice(start, start + n)
            finished.append(
                Samples(
                    prompt_id=prompts[owner[start]].id,
                    completions=[
                        str(self.tokenizer.decode(x, skip_special_tokens=True)) for x in ids[span]
                    ],
                    completion_ids=ids[span],
                    logprobs=logprobs[span],
                    finish_reasons=reasons[span],
                )
            )
        return finished


@dataclass(frozen=True)
class _Rows:
    """What one batch produced, row by row."""

    prompt: list[int]
    ids: list[list[int]]
    logprobs: list[list[float]]
    reasons: list[FinishReason]


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    if declared is None:
        declared = tokenizer.eos_token_id
    every = declared if isinstance(declared, list) else [declared]
    return tuple(token for token in every if isinstance(token, int))


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
