"""Adaptive best-of-N over a sampler: draw in rounds, until every prompt has stopped by the rule.

The rule is `sharpen.selection.adaptive`. A round draws the next sample indices of the prompts that
are still open, so what is drawn of a prompt is a beginning of what a fixed N would draw. The choice
does not depend on the size of a round; the number of draws behind it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from sharpen.errors import InputError, check_value
from sharpen.scoring import Scores
from sharpen.selection.adaptive import AdaptiveChoice, Stopping, draws_in_order, outcome_of

from .base import Prompt, Sampler, Samples, SamplingConfig, joined

ROUND = 8  # draws of a prompt between two looks at the rule; chosen


@dataclass(frozen=True)
class AdaptiveSamples:
    """What was drawn, and what the rule chose from it.

    Attributes:
        samples: Everything drawn of each prompt, in the order of the prompts; up to a round more
            than the rule used.
        choice: Indices into those samples, draws used, and which prompts stopped by the rule.
    """

    samples: list[Samples]
    choice: AdaptiveChoice

    @property
    def n_drawn(self) -> int:
        """Completions drawn of all prompts together: the cost."""
        return sum(len(samples.completions) for samples in self.samples)


def sample_adaptively(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    delta: float = 0.05,
    round_size: int = ROUND,
) -> AdaptiveSamples:
    """Draw until the best completion of each prompt is certified, or `config.n` are drawn.

    A completion that the model did not end, or whose logits are NaN, counts as a draw and is never
    chosen: what is certified is the most probable completion within `max_new_tokens`.

    Args:
        sampler: Draws them; honours `SamplingConfig.first`.
        prompts: Of distinct ids.
        config: `n` is the cap. Temperature and top_p must be 1: the rule is about the model's own
            distribution.
        delta: Chance, at most, that a certified choice is not the most probable completion.
        round_size: Completions of a prompt drawn at a time. Small rounds draw less in vain, large
            ones call the sampler less often.

    Raises:
        InputError: If `delta`, `round_size`, temperature or top_p is not as above, or as the
            sampler does.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix D.
    """
    if config.temperature != 1 or config.top_p != 1:
        raise InputError(
            "`temperature` and `top_p` must be 1, because the rule counts draws of the model's own "
            f"distribution, got {config.temperature} and {config.top_p}."
        )
    check_value("round_size", round_size, round_size >= 1, "at least 1")
    check_value("round_size", round_size, isinstance(round_size, Integral), "a whole number")
    # a bad `delta` is an error of no prompts, too
    Stopping(delta, config.n)
    rules = [Stopping(delta, config.n) for _ in prompts]
    drawn = [Samples(prompt.id, [], [], [], []) for prompt in prompts]
    n_seen = 0
    while still_open := [p for p, rule in enumerate(rules) if not rule.is_over]:
        n = min(round_size, max(rules[p].n_wanted for p in still_open))
        this_round = replace(config, n=n, first=config.first + n_seen)
        batches = sampler.sample([prompts[p] for p in still_open], this_round)
        by_id = {samples.prompt_id: samples for batch in batches for samples in batch}
        fresh = [by_id[prompts[p].id] for p in still_open]
        scores = Scores.from_logprobs(
            [samples.logprobs for samples in fresh],
            [[reason == "stop" for reason in samples.finish_reasons] for samples in fresh],
        )
        for p, samples, logprobs in zip(still_open, fresh, draws_in_order(scores), strict=True):
            drawn[p] = joined([drawn[p], samples])
            rules[p].see(logprobs)
        n_seen += n
    return AdaptiveSamples(drawn, outcome_of(rules))
