"""SharpenLM: the harness's `hf` model with log-likelihoods from the scorer.

Loading, tokenisation, chat templates, splitting over ranks and generation are `hf`'s own code.
What differs is how the log-probs of given continuations are computed: every context once for all
of its continuations, beginnings that contexts share once for all of them, and never a tensor of
tokens x vocabulary.

S scored tokens, N requests of one call of the scorer.
"""

import logging
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from sharpen.errors import InputError
from sharpen.models import SHIPPED, ModelLimits
from sharpen.scoring import Scorer, Scores

from .grouping import Ids, chunks, fitted

logger = logging.getLogger(__name__)

# tokens of one forward at least, whatever the batch size; chosen, not measured
FLOOR = 4096
# where `batch_size=auto` begins: the scorer's own default
AUTO = 16384
# forwards between two steps of the progress bar, and between two writes to the response cache
FORWARDS = 16

# a request's text (None for a window of a longer one), its context and its continuation
Request = tuple[tuple[str, str] | None, Ids, Ids]
Answer = tuple[float, bool]


class SharpenLM(HFLM):
    """The harness's `hf`, with log-likelihoods from the scorer.

    Args:
        pretrained: As `hf` takes it: a hub id, a folder, or a loaded model; or "game24", which
            ships with sharpen.
        max_tokens: Tokens of one forward. Default: `batch_size` times the longest request, as `hf`
            reads in one batch, and at least 4096; 16384 with `batch_size=auto`, halved for as
            long as memory runs out.
        sharing: As in `Scorer`.
        **options: Every argument of `hf`.

    Raises:
        InputError: If the model is an encoder-decoder, `max_length` is beyond its context, or
            `softmax_dtype` is not the fp32 that the kernel computes in.
    """

    # every option of the host, by its own name
    def __init__(
        self,
        pretrained: Any,
        *,
        max_tokens: int | None = None,
        sharing: str = "auto",
        **options: Any,
    ):
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        if options.get("backend", "default") == "seq2seq":
            raise InputError(
                "`backend` must be causal, got 'seq2seq'; take `--model hf` for encoder-decoders."
            )
        if isinstance(pretrained, str) and pretrained in SHIPPED:
            pretrained = str(SHIPPED[pretrained])
        super().__init__(pretrained, **options)
        if self.softmax_dtype not in (None, torch.float32):
            raise InputError(
                f"`softmax_dtype` must be float32, got {self.softmax_dtype}: log-probs are always "
                "summed up in fp32; leave it out."
            )
        limit = ModelLimits.of(self.model).max_length
        if limit is not None and self.max_length > limit:
            raise InputError(
                f"`max_length` must be at most the model's context of {limit} tokens, got "
                f"{self.max_length}; lower it, or change the model's configuration."
            )
        self._given_tokens = max_tokens
        self._sharing = sharing
        # refused before the first request is built
        assert self._scorer.model is self.model

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, tokenizer=self.tokenizer, sharing=self._sharing)

    # the harness's own request objects
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Log-prob of each continuation, in nats, and whether greedy decoding would write it.

        Raises:
            InputError: If a request has neither a context nor a continuation.
        """
        for request in requests:
            if request.args[:2] == ("", ""):
                raise InputError(
                    f"task {request.task_name!r}, document {request.doc_id}: context and "
                    "continuation must not both be empty; mend the task."
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    # the harness's own request objects
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of each whole text, in nats, in windows that predict every token once."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args[:1], total)
        return totals

    # what `hf` asks of a batch is no concern of the scorer
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[Answer]:
        """`loglikelihood` of token ids: the method that the harness leaves to a model type."""
        answers: list[Answer] = [(0.0, True)] * len(requests)
        pairs = [
            (fitted(_named(text, i), context, continuation, self.max_length), continuation)
            for i, (text, context, continuation) in enumerate(requests)
        ]
        _warn_of_cuts(requests, pairs, self.max_length)
        self._scorer.max_tokens = self._budget(pairs)
        hidden = disable_tqdm or self.rank != 0
        label = "Running loglikelihood requests"
        with tqdm(total=len(requests), disable=hidden, desc=label) as bar:
            for numbers in chunks(pairs, FORWARDS * self._scorer.max_tokens):
                scores = self._scores([pairs[i] for i in numbers])
                for i, answer in zip(numbers, _answers(scores), strict=True):
                    answers[i] = answer
                    text = requests[i][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                bar.update(len(numbers))
        return answers

    def _budget(self, pairs: list[tuple[Ids, Ids]]) -> int:
        """Tokens of one forward."""
        if self._given_tokens is not None:
            return self._given_tokens
        if self.batch_size == "auto":
            return AUTO
        return max(FLOOR, int(self.batch_size) * _longest(pairs))

    def _scores(self, pairs: list[tuple[Ids, Ids]]) -> Scores:
        """Scores of all continuations; with `batch_size=auto`, in less memory where it runs out."""
        scorer, dtype = self._scorer, self.mixed_precision_dtype
        contexts = [context for context, _ in pairs]
        continuations = [[continuation] for _, continuation in pairs]
        # probes judge the model's own arithmetic, so they come before mixed precision
        logger.debug("%s", scorer.route)
        while True:
            try:
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    return scorer.score(contexts, continuations, stats=("logprob", "is_greedy"))
            except torch.OutOfMemoryError:
                # a sequence above the budget runs alone: less would change nothing for it
                if self.batch_size != "auto" or scorer.max_tokens <= _longest(pairs):
                    raise
            scorer.max_tokens //= 2
            torch.cuda.empty_cache()
            logger.warning("out of memory: %d tokens a forward from now on.", scorer.max_tokens)


def _longest(pairs: list[tuple[Ids, Ids]]) -> int:
    """Tokens that are read of the longest request."""
    return max((len(context) + len(end) - 1 for context, end in pairs), default=0)


def _answers(scores: Scores) -> list[Answer]:
    """Sums over fp64 in token order, and whether every token is the greedy one."""
    logprob_S, greedy_S = scores.tokens.logprob, scores.tokens.is_greedy
    assert logprob_S is not None
    assert greedy_S is not None
    total_N = torch.segment_reduce(logprob_S.double(), "sum", offsets=scores.offsets)
    greedy_N = torch.segment_reduce(greedy_S, "min", offsets=scores.offsets)
    return list(zip(total_N.tolist(), (greedy_N > 0).tolist(), strict=True))


def _named(text: tuple[str, str] | None, number: int) -> str:
    """What an error calls a request."""
    if text is None:
        return f"window {number}"
    end = text[1] if len(text[1]) <= 40 else text[1][:40] + "..."
    return f"request {number} (continuation {end!r})"


def _warn_of_cuts(requests: list[Request], pairs: list[tuple[Ids, Ids]], max_length: int) -> None:
    """Log how many contexts were too long."""
    n_cut = sum(
        len(context) < len(request[1])
        for request, (context, _) in zip(requests, pairs, strict=True)
    )
    if n_cut:
        logger.warning(
            "%d of %d requests are longer than `max_length` of %d tokens: cut from the left, and "
            "contexts cut at different places share nothing.",
            n_cut,
            len(requests),
            max_length,
        )
