"""Linear softmax with one prompt: best-of-N needs exp(d) samples, square-loss learners poly(d).

    pi_theta(y) = exp<y, theta> / Z(theta),   y in a packing of the unit sphere of R^d,
    |theta| <= B,   pi_base = pi_{theta*},   theta* = y*

The packing holds exp(Theta(d)) points, so pi_base(y*) falls as fast, while y* stands out from each
other point by a constant factor. Differences of log-probs are linear in theta: a pair of samples
is one linear equation of (1 + 1/beta) theta*, the optimum of the KL-regularised self-reward.

`linear_softmax_study` tabulates the samples that best-of-N with SFT, offline square loss and XPO
take against the dimension, on instances with 2^(d + 1) completions at least 1/2 apart. A learner's
cost is the least number of samples with which half of its runs, or more, end with
pi(y*) >= 1 - delta.

Y completions, d dimensions, K pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.records import Row

from .best_of_n import best_of_n_law
from .coverage import check_share
from .study import Line, Panel, Study, markdown, slope

# of the study
DELTA = 0.1
# samples are tried in steps of this factor
STEP = math.sqrt(2)
# T of XPO, in d: with many rounds the proof's optimism is light, with few it outweighs the data
MANY, FEW = 64, 4
COLUMNS = {
    "sft": "best-of-N and SFT",
    "offline": "square loss, pairs of pi_base",
    "xpo": f"XPO, T = {MANY} d",
    "xpo_short": f"XPO, T = {FEW} d",
}


def sphere_packing(
    d: int, size: int, min_distance: float, generator: torch.Generator
) -> Float64[Tensor, "Y d"]:
    """`size` random unit vectors of R^d, each pair at least `min_distance` apart."""
    points_Yd = torch.empty(size, d, dtype=torch.float64)
    n_placed = 0
    for _ in range(100 * size + 1000):
        point_d = torch.randn(d, generator=generator, dtype=torch.float64)
        point_d = point_d / point_d.norm()
        apart_Y = (points_Yd[:n_placed] - point_d).norm(dim=1)
        if (apart_Y >= min_distance).all():
            points_Yd[n_placed] = point_d
            n_placed += 1
        if n_placed == size:
            return points_Yd
    raise InputError(
        f"`size` must fit the sphere of R^{d}, got {size} points {min_distance} apart; "
        "take fewer or nearer ones."
    )


@dataclass(frozen=True)
class LinearSoftmax:
    """The instance; y* is completion 0.

    Attributes:
        phi: Unit vectors, one a completion.
        beta: Of the KL-regularised reward.
        bound: B, the largest norm of theta; `of` gives room for twice the optimum's.
    """

    phi: Float64[Tensor, "Y d"]
    beta: float
    bound: float

    @classmethod
    def of(cls, phi: Float64[Tensor, "Y d"], delta: float) -> "LinearSoftmax":
        """With the paper's beta = gamma_margin / (2 log(2 |Y| / delta)), and its own margin.

        Source:
            Huang et al. 2024, arXiv:2412.01951, theorem 4.3.
        """
        check_share("delta", delta)
        nearest = float((phi[1:] @ phi[0]).max())
        beta = math.expm1(1 - nearest) / (2 * math.log(2 * len(phi) / delta))
        return cls(phi, beta, 2 * (1 + 1 / beta))

    def logprob(self, theta: Float64[Tensor, " d"]) -> Float64[Tensor, " Y"]:
        """Log pi_theta of every completion, in nats."""
        return (self.phi @ theta).log_softmax(0)

    @property
    def base(self) -> Float64[Tensor, " Y"]:
        """Log pi_base, in nats."""
        return self.logprob(self.phi[0])

    def star(self, theta: Float64[Tensor, " d"]) -> float:
        """pi_theta(y*)."""
        return math.exp(float(self.logprob(theta)[0]))


def most_likely(model: LinearSoftmax, chosen: Int64[Tensor, " n"]) -> Float64[Tensor, " d"]:
    """Theta of largest likelihood of the chosen completions, within the ball: SFT, solved."""
    mean_d = model.phi[chosen].mean(0)

    def loss(theta: Tensor) -> Tensor:
        return (model.phi @ theta).logsumexp(0) - mean_d @ theta

    return _in_ball(model, loss)


def best_of_n_sft(
    model: LinearSoftmax, n: int, n_samples: int, rng: np.random.Generator
) -> Float64[Tensor, " d"]:
    """SFT-Sharpening: n best-of-N completions, drawn from their exact law, then `most_likely`."""
    base_Y = model.base.numpy()
    law_Y = best_of_n_law(np.exp(base_Y) / np.exp(base_Y).sum(), base_Y, n_samples)
    chosen = rng.choice(len(law_Y), size=n, p=law_Y / law_Y.sum())
    return most_likely(model, torch.from_numpy(chosen))


def square_loss_fit(
    model: LinearSoftmax,
    first: Sequence[int],
    second: Sequence[int],
    *,
    optimism: float = 0.0,
) -> Float64[Tensor, " d"]:
    """Theta that fits pairs of completions, and lowers the log-prob of the second ones.

        optimism sum_k log pi(y'_k)
          + sum_k ( beta log pi(y_k)/pi_base(y_k) - beta log pi(y'_k)/pi_base(y'_k)
                    - (log pi_base(y_k) - log pi_base(y'_k)) )^2

    Args:
        model: The instance.
        first: y of each pair.
        second: y' of each pair, of the base model.
        optimism: On the scale of the square loss; 0 is RLHF-Sharpening. Above 0 the objective is
            not convex, and what is returned is a local minimiser.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Eq. (8) and algorithm 1. The printed algorithm
        subtracts the squares; its proof adds them, as here.
    """
    second_K = torch.tensor(list(second), dtype=torch.int64)
    apart_Kd = model.phi[torch.tensor(list(first), dtype=torch.int64)] - model.phi[second_K]
    # the partition function is the same on both sides of a pair
    target_K = (1 + model.beta) * (apart_Kd @ model.phi[0])

    def loss(theta: Tensor) -> Tensor:
        squares = (model.beta * (apart_Kd @ theta) - target_K).square().sum()
        return squares + optimism * model.logprob(theta)[second_K].sum()

    return _in_ball(model, loss)


def optimism_of(model: LinearSoftmax, rounds: int, rho: float = 0.1) -> float:
    """Weight of the optimism term on the scale of the square loss, by the proof.

        beta (V + R) sqrt( d log(rounds) + log(1 / rho) over SEC rounds ),   SEC = d log(1 + rounds)

    with R = max_y log 1/pi_base(y) and V = 2 for the optimum's own |beta log pi/pi_base|.

    It falls as rounds^(-1/2), and with too few rounds it outweighs the squares.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix J: the proof weighs the log-probs by beta and
        the squares by beta / (alpha (V + R)^2). A cover of the ball stands for the class, its
        logarithm d log(1 + rounds) without constants.
    """
    d = model.phi.shape[1]
    log_class = d * math.log(1 + rounds) + math.log(1 / rho)
    largest = float(-model.base.min()) + 2
    return model.beta * largest * math.sqrt(log_class / (d * math.log(1 + rounds) * rounds))


def rounds_until_sharpened(
    model: LinearSoftmax,
    delta: float,
    generator: torch.Generator,
    *,
    max_rounds: int,
    explore: bool = True,
    optimism: float = 1.0,
) -> int | None:
    """Rounds of XPO, two samples each, until pi(y*) >= 1 - delta; None if never.

    Args:
        model: The instance.
        delta: In (0, 1).
        generator: Of all draws.
        max_rounds: T, which the weight of the optimism depends on.
        explore: Draw y from the current policy, with optimism; else both from the base, without:
            offline RLHF-Sharpening, refitted as pairs come in.
        optimism: Share of the proof's weight on the optimism term.
    """
    check_share("delta", delta)
    weight = optimism * optimism_of(model, max_rounds) if explore else 0.0
    theta_d = model.phi[0].clone()
    base_Y = model.base.exp()
    first: list[int] = []
    second: list[int] = []
    for t in range(1, max_rounds + 1):
        law_Y = model.logprob(theta_d).exp() if explore else base_Y
        first.append(int(torch.multinomial(law_Y, 1, generator=generator)))
        second.append(int(torch.multinomial(base_Y, 1, generator=generator)))
        theta_d = square_loss_fit(model, first, second, optimism=weight)
        if model.star(theta_d) >= 1 - delta:
            return t
    return None


def _in_ball(model: LinearSoftmax, loss) -> Float64[Tensor, " d"]:
    """A minimiser of `loss` over |theta| <= B, by L-BFGS in a smooth chart of the ball."""
    free_d = torch.full(model.phi.shape[1:], 1e-3, dtype=torch.float64, requires_grad=True)

    def theta() -> Tensor:
        return model.bound * free_d / (1 + free_d.square().sum()).sqrt()

    optimizer = torch.optim.LBFGS(
        [free_d], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta())
        value.backward()
        return value

    optimizer.step(closure)
    return theta().detach()


def linear_softmax_study(*, quick: bool = False) -> Study:
    """Dimensions 4 to 12; `quick` takes 3 and 4."""
    dimensions = (3, 4) if quick else (4, 6, 8, 10, 12)
    cases = [{"d": d, "repeats": 1 if quick else 7} for d in dimensions]
    return Study(cases, measure, table, panels)


def measure(case: Row, rng: np.random.Generator) -> Row:
    """Samples that each learner takes on one random instance; None where most runs never end."""
    d, repeats = case["d"], case["repeats"]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    model = LinearSoftmax.of(sphere_packing(d, 2 ** (d + 1), 0.5, generator), DELTA)
    n, n_samples = _sft(model, repeats, rng)

    def pairs(*, explore: bool, horizon: int) -> int | None:
        rounds = [
            rounds_until_sharpened(model, DELTA, generator, max_rounds=horizon * d, explore=explore)
            for _ in range(repeats)
        ]
        middle = sorted(math.inf if r is None else r for r in rounds)[(repeats - 1) // 2]
        return None if math.isinf(middle) else 2 * int(middle)

    return {
        "completions": len(model.phi),
        "coverage": 1 / model.star(model.phi[0]),
        "margin": math.expm1(1 - float((model.phi[1:] @ model.phi[0]).max())),
        "beta": model.beta,
        "sft_n": n,
        "sft_n_samples": n_samples,
        "sft": n * n_samples,
        "offline": pairs(explore=False, horizon=MANY),
        "xpo": pairs(explore=True, horizon=MANY),
        "xpo_short": pairs(explore=True, horizon=FEW),
    }


def _sft(model: LinearSoftmax, repeats: int, rng: np.random.Generator) -> tuple[int, int]:
    """The cheapest n and N, n in 1, 4, 16."""
    costs = []
    for n in (1, 4, 16):
        wanted = 1 / model.star(model.phi[0]) / 16
        while not _half_end(model, n, math.ceil(wanted), repeats, rng):
            wanted *= STEP
        costs.append((n * math.ceil(wanted), n, math.ceil(wanted)))
    return min(costs)[1:]


def _half_end(
    model: LinearSoftmax, n: int, n_samples: int, repeats: int, rng: np.random.Generator
) -> bool:
    """Whether half of the runs, or more, end with enough mass on y*."""
    ended = sum(
        model.star(best_of_n_sft(model, n, n_samples, rng)) >= 1 - DELTA for _ in range(repeats)
    )
    return 2 * ended >= repeats


def table(rows: Sequence[Row]) -> str:
    """One line a dimension, and how the costs grow."""
    heads = ["d", "completions", "C_cov", "margin", *COLUMNS.values()]
    lines = [
        [row["d"], row["completions"], row["coverage"], row["margin"], *(row[k] for k in COLUMNS)]
        for row in rows
    ]
    d = [row["d"] for row in rows]
    rate = slope(d, [math.log(row["sft"]) for row in rows])
    text = markdown(heads, lines) + f"\nBest-of-N and SFT: m grows as e^({rate:.2f} d)"
    for key in ("offline", "xpo"):
        if all(row[key] is not None for row in rows):
            power = slope([math.log(x) for x in d], [math.log(row[key]) for row in rows])
            text += f"; {COLUMNS[key]}: as d^{power:.2f}"
    return text + ".\n"


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Samples against the dimension."""
    lines = []
    for key, name in COLUMNS.items():
        own = [row for row in rows if row[key] is not None]
        if own:
            lines.append(Line(name, [row["d"] for row in own], [row[key] for row in own]))
    x = [row["d"] for row in rows]
    lines.append(Line("C_cov", x, [row["coverage"] for row in rows], dashed=True))
    return [Panel("d", "samples m until y* has 0.9 of the mass", lines, linear_x=True)]
