"""Draw tokens so that a sample depends on its prompt, its index and the seed alone.

    token = argmax_v  logits[v] / temperature - log(E[v]),      E[v] ~ Exp(1)

(the Gumbel-max trick). The noise E comes from a counter-based hash of (row key, step, v), so
it is the same in any batch, on any device, after any restart. What remains is floating point:
a model's logits differ in their last bits between batch shapes, and would flip a draw whose
two best tokens are closer than that. Such near-ties (about one draw in 10,000) are reported,
so that the sampler can settle them on logits that were computed for the row alone.

B rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

# two best tokens closer than this (nats, after division by temperature) are a near-tie in fp32;
# ten times the largest difference seen between batch shapes
NEAR_TIE_NATS = 1e-4
# cumulative probability within this of top_p: the nucleus itself is in doubt
NEAR_EDGE_MASS = 1e-5

# splitmix64 (Steele, Lea & Flood 2014), its unsigned constants as signed 64-bit integers
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def row_key(seed: int, prompt_id: str, sample_id: int) -> int:
    """The 63-bit key of one sample's noise."""
    return _hash(f"{seed}\x00{prompt_id}\x00{sample_id}")


def child_keys(keys: Int64[Tensor, " B"], purpose: str) -> Int64[Tensor, " B"]:
    """63-bit keys of other noise for the same rows: other for each purpose."""
    return _mix(keys + _hash(purpose)) & ((1 << 63) - 1)


def uniform(keys: Int64[Tensor, " B"]) -> Float64[Tensor, " B"]:
    """A number in (0, 1) for each key, a pure function of it."""
    # 52 bits and a half: neither 0 nor 1 in fp64
    return ((keys >> 11).double() + 0.5) * 2.0**-52


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def exponential_noise(keys: Int64[Tensor, " B"], step: int, V: int) -> Float32[Tensor, "B V"]:
    """Exp(1) noise, a pure function of (key, step, v)."""
    start = _mix(keys + _mix(torch.full_like(keys, step) * _GAMMA))
    counter = torch.arange(1, V + 1, device=keys.device) * _GAMMA
    bits = _mix(start[:, None] + counter) & ((1 << 63) - 1)
    # a half is added in the integers' last place: never 0, and small values keep all their bits
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-63
    return -torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))


def _mix(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    x = x ^ _shift(x, 30)
    x = (x * _MIX_1) ^ _shift(x * _MIX_1, 27)
    x = x * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Int64[Tensor, "..."], by: int) -> Int64[Tensor, "..."]:
    # int64 shifts carry the sign in; the mask makes it an unsigned shift
    return (x >> by) & ((1 << (64 - by)) - 1)


@dataclass(frozen=True)
class Drawn:
    """One token of each row, and whether rounding could have decided it."""

    token: Int64[Tensor, " B"]
    is_near_tie: Bool[Tensor, " B"]


def draw(
    logits: Float32[Tensor, "B V"],
    keys: Int64[Tensor, " B"],
    step: int,
    *,
    temperature: float,
    top_p: float,
) -> Drawn:
    """Draw one token from each row of logits; greedy when `temperature` is 0.

    A row of NaN draws an arbitrary token; the caller looks for those itself.
    """
    if temperature == 0:
        score = logits
    else:
        noise = exponential_noise(keys, step, logits.shape[1])
        score = logits / temperature - noise.log()
    if temperature == 0 or top_p == 1:
        return Drawn(*_best(score))
    inside, doubtful = _nucleus(logits / temperature, top_p)
    token, is_near_tie = _best(score.masked_fill(~inside, float("-inf")))
    # had the tokens on the edge of the nucleus fallen the other way, would another one win?
    without, _ = _best(score.masked_fill(~inside | doubtful, float("-inf")))
    with_all, _ = _best(score.masked_fill(~(inside | doubtful), float("-inf")))
    return Drawn(token, is_near_tie | (without != token) | (with_all != token))


def _best(score: Float32[Tensor, "B V"]) -> tuple[Int64[Tensor, " B"], Bool[Tensor, " B"]]:
    # of equal scores the lowest id, as `rank` and `generate` have it; `topk` returns any of them
    # (`max` finds the same one as `argmax`, in a tenth of its time on a CPU)
    token = score.max(dim=1).indices
    if score.shape[1] == 1:
        return token, torch.zeros_like(token, dtype=torch.bool)
    best = score.topk(2, dim=1).values
    return token, best[:, 0] - best[:, 1] < NEAR_TIE_NATS


def _nucleus(
    logits: Float32[Tensor, "B V"], top_p: float
) -> tuple[Bool[Tensor, "B V"], Bool[Tensor, "B V"]]:
    """Tokens of the nucleus, and tokens whose membership hangs on rounding."""
    prob, order = logits.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    before = prob.cumsum(dim=1) - prob
    inside = torch.zeros_like(before, dtype=torch.bool)
    doubtful = inside.clone()
    inside.scatter_(1, order, before < top_p)
    doubtful.scatter_(1, order, (before - top_p).abs() < NEAR_EDGE_MASS)
    # the most probable token is always inside
    doubtful.scatter_(1, order[:, :1], False)
    inside.scatter_(1, order[:, :1], True)
    return inside, doubtful
