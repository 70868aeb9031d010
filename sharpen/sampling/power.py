"""What the samplers of the power distribution share: its target, its checks, its ways to decode.

    p_alpha(y | x) = p(y | x)^alpha / Z(x),      Z(x) = sum_y p(y | x)^alpha

over the sequences y that a model can be made to write: those that end with an end token, and those
of `max_new_tokens` tokens that do not, cut there. It is the law that maximises

    E[log p(y | x)] - beta KL(. || p),      alpha = 1 + 1 / beta

(Huang et al. 2024, arXiv:2412.01951, Eq. 3). Lowering the temperature is another law: it raises
each token's probability to alpha and forgets what may follow the token.
"""

import functools
import logging
from collections.abc import Callable, Sequence

from jaxtyping import Int64
from torch import Tensor

from sharpen.errors import InputError

from .base import Prompt, SamplingConfig
from .decode import Take, crosses_rope_boundary, decode_again, decode_rereading, read
from .hf import TransformersSampler

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int], Take], None]


def check_settings(settings: object, rules: Sequence[tuple[str, bool, str]]) -> None:
    """Refuse the first setting that breaks its rule.

    Args:
        settings: What has the attributes.
        rules: Name of the attribute, whether it holds, what is wanted.

    Raises:
        InputError: If one does not hold.
    """
    for name, holds, wanted in rules:
        if not holds:
            raise InputError(f"`{name}` must be {wanted}, got {getattr(settings, name)}.")


class PowerSampler(TransformersSampler):
    """A transformers model, the prompts that it has read, and no temperature of the caller's."""

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """See `TransformersSampler`.

        Raises:
            InputError: Also if `config` asks for a temperature or a nucleus.
        """
        for name in ("temperature", "top_p"):
            if (value := getattr(config, name)) != 1:
                raise InputError(
                    f"`{name}` must be 1 for a sampler of the power distribution, got {value}; "
                    "`alpha` says how sharp it is."
                )
        super().check(prompts, config)

    def opened(self, prompts: Int64[Tensor, "G P"], max_new_tokens: int) -> Decode:
        """Decodes rows of these prompts, as often as it is called; reads them once if it can."""
        if self.reads_once(prompts.shape[1], max_new_tokens):
            prompts_read = read(self.model, prompts)
            return lambda counts, take: decode_again(self.model, prompts_read, counts, take)
        return lambda counts, take: decode_rereading(self.model, prompts, counts, take)

    def reads_once(self, P: int, max_new_tokens: int) -> bool:
        """Whether keys of a prompt of P tokens serve for all that follows it; said if never."""
        return self._shares and not crosses_rope_boundary(self.model, P, P + max_new_tokens)

    @functools.cached_property
    def _shares(self) -> bool:
        if self.route == "shared":
            return True
        logger.info(
            "%s samples its power distribution without a cache: whole sequences are read again at "
            "every token.", type(self.model).__name__,
        )  # fmt: skip
        return False
