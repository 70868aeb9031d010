"""Scorer: exact statistics of given completions under a transformers causal LM."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sharpen.errors import InputError
from sharpen.limits import ModelLimits
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

from .forward import evaluating
from .head import Head
from .pairs import Pair, encode_text, pair_up
from .probe import find_head
from .scores import Scores
from .token_stats import check_stats, on_cpu, token_stats

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

N_NAMED = 5  # completions that one warning names


class Scorer:
    """Scores completions with a model's own probabilities.

    Not thread-safe: a call sets the model's eval mode and restores it.

    Args:
        model: A transformers causal LM on any device, or a path, hub id or "game24" to load.
        tokenizer: For `score_text`; default: the one of the path.
        max_tokens: Budget of one forward, in padded tokens. A longer sequence runs alone.
        device: Where to load a path; default: the GPU if there is one.
        dtype: What to load a path as; default: that of the checkpoint on a GPU, fp32 on a CPU.
        trust_remote_code: Run model code that comes with the path.
        allow_pickle: Read pickled weights where the path has no safetensors.

    Raises:
        InputError: If there is no such model, `max_tokens` < 1, the model is an encoder-decoder, or
            loading options come with a model that is loaded already.

    Example:
        >>> scorer = Scorer("game24")
        >>> scores = scorer.score([[1, 5, 9]], [[[7, 2], [8]]])
        >>> scores.reward("logprob").shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel | str | Path",
        *,
        tokenizer: "transformers.PreTrainedTokenizerBase | None" = None,
        max_tokens: int = 16384,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ):
        if max_tokens < 1:
            raise InputError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        loading = {
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        }
        # what a copy in another process is built from: a path stays a path
        own = {"model": model, "tokenizer": tokenizer, "max_tokens": max_tokens}
        self._arguments = own | loading
        if isinstance(model, (str, Path)):
            from sharpen.models import load_model

            self.model = load_model(model, **loading)
        else:
            given = [name for name, value in loading.items() if value]
            if given:
                raise InputError(
                    f"`{given[0]}` applies to a path, got a loaded {type(model).__name__}; "
                    "move or cast the model itself first."
                )
            self.model = model
        if self.model.config.is_encoder_decoder:
            raise InputError(
                f"`model` must be a causal LM, got the encoder-decoder "
                f"{type(self.model).__name__}; only decoder-only models can be scored."
            )
        self.max_tokens = max_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._arguments,)

    @property
    def route(self) -> Literal["hidden", "logits"]:
        """How this model is scored; found by a probe at first use.

        "hidden" projects hidden rows in `linear_logprob`. "logits" lets the model compute the
        logits of one small batch at a time: slower, as exact as the model's own arithmetic.
        """
        return "logits" if self._head is None else "hidden"

    @cached_property
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """The tokenizer of `score_text`.

        Raises:
            InputError: If none was given with a model that is not a path, or none can be loaded.
        """
        tokenizer, model = self._arguments["tokenizer"], self._arguments["model"]
        if tokenizer is not None:
            return tokenizer
        if not isinstance(model, (str, Path)):
            raise InputError(
                "text needs a tokenizer, got none; pass `tokenizer=` to Scorer, or a path as model."
            )
        from sharpen.models import load_tokenizer

        return load_tokenizer(model, trust_remote_code=self._arguments["trust_remote_code"])

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        *,
        valid: Sequence[Sequence[bool]] | None = None,
        stats: Sequence[str] = ("logprob",),
    ) -> Scores:
        """Scores of every completion of every prompt, on the CPU; not differentiable.

        The model runs in eval mode, and gets its own mode back. Only completion tokens are scored.
        A NaN stays in its completion and is reported in one logged warning.

        Args:
            prompts: Token ids of each prompt, at least one each, with their BOS if it has one.
            completions: Token ids of the completions of each prompt: any number, any lengths, with
                their EOS if it shall count. An empty completion has 0 scored tokens.
            valid: False for completions that must not be chosen; default: all True.
            stats: Token statistics to compute beside the log-prob: names of fields of
                `sharpen_kernels.TokenStats`, where their formulas stand.

        Raises:
            InputError: If the lists disagree in length, a statistic is unknown, a prompt or
                completion is one that the model cannot read, or the model is not causal.
        """
        lengths = [[len(completion) for completion in group] for group in completions]
        pairs = pair_up(ModelLimits.of(self.model), prompts, completions)
        names = check_stats(stats)
        # an empty layout first: a bad `valid` must not cost a forward
        Scores.of(TokenStats(), lengths, valid)
        with torch.no_grad(), evaluating(self.model):
            tokens = self._token_stats(pairs, names)
        columns = {name: on_cpu(getattr(tokens, name)) for name in names}
        scores = Scores.of(TokenStats(**columns), lengths, valid)
        broken = scores.nan_completions()
        if broken:
            more = f" and {len(broken) - N_NAMED} more" if len(broken) > N_NAMED else ""
            logger.warning(
                "log-prob is NaN in %s%s: never chosen; look for NaN in the weights, or overflow "
                "in half precision.",
                ", ".join(f"completions[{p}][{g}]" for p, g in broken[:N_NAMED]),
                more,
            )
        return scores

    def score_text(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        *,
        valid: Sequence[Sequence[bool]] | None = None,
        stats: Sequence[str] = ("logprob",),
        add_eos: bool = False,
    ) -> Scores:
        """`score` of text.

        A prompt is tokenised with the tokenizer's special tokens, a completion without and apart
        from its prompt, as in sampling; so the tokens can differ from those of the joined text.

        Args:
            prompts: Plain text; messages go through the chat template first.
            completions: Texts of each prompt.
            valid: As in `score`.
            stats: As in `score`.
            add_eos: Score the end of the completion too.

        Raises:
            InputError: As `score`, and if there is no tokenizer, or no EOS to add.
        """
        prompt_ids, completion_ids = encode_text(
            self.tokenizer, prompts, completions, add_eos=add_eos
        )
        return self.score(prompt_ids, completion_ids, valid=valid, stats=stats)

    def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> Float[Tensor, " S"]:
        """Log-prob, in nats, of every completion token, end to end; differentiable.

        Gradients flow to all parameters of the model, which stays in the mode it is in. fp32, and
        fp64 for an fp64 model; on the device of the model.

        Args:
            prompts: As in `score`.
            completions: As in `score`.

        Raises:
            InputError: As `score`.
        """
        pairs = pair_up(ModelLimits.of(self.model), prompts, completions)
        tokens = self._token_stats(pairs, ("logprob",))
        assert tokens.logprob is not None
        return tokens.logprob

    @cached_property
    def _head(self) -> Head | None:
        finding = find_head(self.model)
        name = type(self.model).__name__
        if finding.head is None:
            logger.warning("%s takes the slower logits route: %s.", name, finding.reason)
        else:
            logger.info("%s takes the hidden route: %s.", name, finding.reason)
        return finding.head

    def _token_stats(self, pairs: list[Pair], stats: Sequence[Statistic]) -> TokenStats:
        return token_stats(
            self.model, pairs, head=self._head, max_tokens=self.max_tokens, stats=stats
        )


def _rebuild(arguments: dict[str, Any]) -> Scorer:
    return Scorer(**arguments)
