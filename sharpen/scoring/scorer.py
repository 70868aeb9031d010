"""Scorer: exact statistics of given completions under a transformers causal LM."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sharpen.errors import InputError, check_value
from sharpen.models import ModelLimits, load_model, load_tokenizer
from sharpen.text import TextCodec
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

from .gradients import accumulate, refuse_dropout
from .model_access import Head, evaluating
from .pairs import Group, Ids, Pair, check_groups, pair_up
from .probe import Route, gradient_sharing, probe_model
from .scores import Scores
from .token_stats import (
    WAYS,
    ScoringPath,
    Sharing,
    check_stats,
    check_temperature,
    scoring_path,
    shared_or_whole,
    token_stats,
)

if TYPE_CHECKING:
    import transformers


class Scorer:
    """Scores completions with a model's own probabilities.

    Not thread-safe: a call sets the model's eval mode and restores it.

    Args:
        model: A transformers causal LM on any device, or a path, hub id or "game24" to load.
        tokenizer: For `score_text`; default: the one of the path.
        max_tokens: Budget of one forward, in tokens. A longer sequence runs alone.
        sharing: How completions share their prompt: "auto" takes the first of "tree" (packed rows,
            every shared token once), "cache" (a prompt's cache, its completions in batches) and
            "none" that a probe finds right, "none" if nothing is shared; a name forces one.
        device: Where to load a path; default: the GPU if there is one.
        dtype: What to load a path as; default: that of the checkpoint on a GPU, fp32 on a CPU.
        trust_remote_code: Run model code that comes with the path.
        allow_pickle: Read pickled weights where the path has no safetensors.

    Raises:
        InputError: If there is no such model, `max_tokens` < 1, an encoder-decoder, or loading
            options come with a model that is loaded already.

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
        sharing: str = "auto",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ):
        check_value("max_tokens", max_tokens, max_tokens >= 1, "at least 1")
        if sharing not in ("auto", *WAYS):
            raise InputError(f"`sharing` must be 'auto', {', '.join(WAYS)}, got {sharing!r}.")
        # a copy in another process is built from what this one was: a path stays a path
        self._source = model
        self._loading = {
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        }
        self._tokenizer = tokenizer
        self._sharing = sharing
        self.max_tokens = max_tokens
        self.model = _causal_lm(model, self._loading)

    def __reduce__(self) -> tuple[Any, ...]:
        given = {"tokenizer": self._tokenizer, "sharing": self._sharing, **self._loading}
        return partial(Scorer, self._source, max_tokens=self.max_tokens, **given), ()

    @property
    def route(self) -> Route:
        """How this model is scored; found by probes at first use."""
        return self._route[0]

    @cached_property
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """The tokenizer of `score_text`.

        Raises:
            InputError: If none was given with a model that is not a path, or none can be loaded.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if not isinstance(self._source, (str, Path)):
            raise InputError(
                "text needs a tokenizer, got none; pass `tokenizer=` to Scorer, or a path as model."
            )
        return load_tokenizer(self._source, trust_remote_code=self._loading["trust_remote_code"])

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Group],
        *,
        valid: Sequence[Sequence[bool]] | None = None,
        stats: Sequence[str] = ("logprob",),
        temperature: float = 1.0,
    ) -> Scores:
        """Scores of every completion of every prompt, on the CPU; not differentiable.

        The model runs in eval mode, and gets its own mode back. Only completion tokens are scored.
        Sequences that begin alike share their computation wherever they stand: a prompt may as well
        be given once with N completions as N times with one.
        A NaN stays in its completion and is reported in one logged warning.

        Args:
            prompts: Token ids of each prompt, at least one each, with their BOS if it has one; as a
                list, an array or a tensor.
            completions: Token ids of the completions of each prompt: any number, any lengths, with
                their EOS if it shall count. An empty completion has 0 scored tokens.
            valid: False for completions that must not be chosen; default: all True.
            stats: Token statistics to compute beside the log-prob: names of fields of
                `sharpen_kernels.TokenStats`, where their formulas stand.
            temperature: Divides the model's logits, as in sampling at it.

        Raises:
            InputError: If the lists disagree in length, a statistic is unknown, a prompt or
                completion is one that the model cannot read, the model is not causal, or the
                temperature is not above 0.
        """
        lengths = [[len(completion) for completion in group] for group in completions]
        pairs = pair_up(ModelLimits.of(self.model), prompts, completions)
        names = check_stats(stats)
        # the layout first: a bad `valid` must not cost a forward
        layout = Scores.of(TokenStats(), lengths, valid)
        with torch.no_grad(), evaluating(self.model):
            tokens = self._token_stats(pairs, names, temperature)
        columns = {name: _on_cpu(getattr(tokens, name)) for name in names}
        scores = replace(layout, tokens=TokenStats(**columns))
        scores.warn_of_nan()
        return scores

    def score_text(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        *,
        valid: Sequence[Sequence[bool]] | None = None,
        stats: Sequence[str] = ("logprob",),
        add_eos: bool = False,
        temperature: float = 1.0,
    ) -> Scores:
        """`score` of text.

        A prompt gets what the tokenizer puts in front of a text (BOS), once, and nothing behind. A
        completion is tokenised as its continuation; where the tokenizer would merge the two, the
        prompt stays as it is, and the log says how often. See `sharpen.text`.

        Args:
            prompts: Plain text; messages go through the chat template first.
            completions: Texts of each prompt.
            valid: As in `score`.
            stats: As in `score`.
            add_eos: Score the end of the completion too: after a prompt that the chat template has
                rendered what the template writes behind an answer, else the tokenizer's EOS.
            temperature: As in `score`.

        Raises:
            InputError: As `score`, and if there is no tokenizer, or no EOS to add.
        """
        codec = TextCodec(self.tokenizer, self.model.generation_config)
        if add_eos:
            codec.check_has_end()
        check_groups(prompts, completions)
        ids = [
            codec.completion_ids(prompt, texts, is_ended=add_eos)
            for prompt, texts in zip(prompts, completions, strict=True)
        ]
        codec.warn_merged()
        prompt_ids = [codec.prompt_ids(prompt) for prompt in prompts]
        return self.score(prompt_ids, ids, valid=valid, stats=stats, temperature=temperature)

    def logprobs(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Group],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, " S"]:
        """Log-prob, in nats, of every completion token, end to end; differentiable.

        Gradients flow to all parameters of the model, which stays in the mode it is in. fp32, and
        fp64 for an fp64 model; on the device of the model. A token that several completions share
        has an entry for each of them, so a sum counts it as often (`sharers`).

        Arguments and errors: as in `score`.
        """
        pairs = pair_up(ModelLimits.of(self.model), prompts, completions)
        tokens = self._token_stats(pairs, ("logprob",), temperature)
        assert tokens.logprob is not None
        return tokens.logprob

    def backward(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Group],
        loss: Callable[[Tensor], Tensor] | Tensor,
    ) -> Float[Tensor, " S"]:
        """Add the gradient of a loss of the log-probs to `.grad`; memory does not grow with N.

        What `loss(scorer.logprobs(prompts, completions)).backward()` gives, to rounding: a prompt
        is computed once, its completions in batches of `max_tokens`, each batch forgotten before
        the next. A loss that is a function costs one more forward, to find its slopes.

        Args:
            prompts: As in `score`.
            completions: As in `score`.
            loss: Of the log-probs [S], as `logprobs` returns them, to a scalar; or its slopes [S].

        Returns:
            The log-probs [S], detached.

        Raises:
            InputError: As `score`, if slopes have another shape, or with a function and dropout.
        """
        pairs = pair_up(ModelLimits.of(self.model), prompts, completions)
        if not isinstance(loss, Tensor):
            refuse_dropout(self.model)
            with torch.no_grad():
                tokens = self._token_stats(pairs, ("logprob",))
            assert tokens.logprob is not None
            logprob_S = tokens.logprob.requires_grad_()
            (loss,) = torch.autograd.grad(loss(logprob_S), logprob_S)
        return accumulate(
            self._path,
            pairs,
            loss,
            max_tokens=self.max_tokens,
            sharing=self._gradient_sharing,
        )

    @cached_property
    def _route(self) -> tuple[Route, Head | None]:
        return probe_model(self.model, self._sharing)

    @cached_property
    def _path(self) -> ScoringPath:
        return scoring_path(self.model, self._route[1])

    @cached_property
    def _gradient_sharing(self) -> Sharing:
        return gradient_sharing(self._path, self.route)

    def _token_stats(
        self, pairs: list[Pair], stats: Sequence[Statistic], temperature: float = 1.0
    ) -> TokenStats:
        check_temperature(temperature)
        # a way that is asked for by name is taken, also where nothing is shared
        pack_unshared = self._sharing != "auto"

        def run(way: Sharing) -> TokenStats:
            return token_stats(
                self._path,
                pairs,
                max_tokens=self.max_tokens,
                stats=stats,
                sharing=way,
                pack_unshared=pack_unshared,
                temperature=temperature,
            )

        return shared_or_whole(run, self.route.sharing)


# the options are those of `load_model`
def _causal_lm(
    model: "transformers.PreTrainedModel | str | Path", loading: dict[str, Any]
) -> "transformers.PreTrainedModel":
    """The model, loaded if it is a path; an error if it is an encoder-decoder."""
    if isinstance(model, (str, Path)):
        model = load_model(model, **loading)
    elif given := [name for name, value in loading.items() if value]:
        raise InputError(
            f"`{given[0]}` applies to a path, got a loaded {type(model).__name__}; "
            "move or cast the model itself first."
        )
    if model.config.is_encoder_decoder:
        raise InputError(
            f"`model` must be a causal LM, got the encoder-decoder "
            f"{type(model).__name__}; only decoder-only models can be scored."
        )
    return model


def _on_cpu(x: Tensor) -> Tensor:
    """`x` on the CPU, floats in fp32."""
    return x.to("cpu", torch.float32) if x.is_floating_point() else x.cpu()
