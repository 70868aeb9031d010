import random

import pytest
import torch

from sharpen import Scores
from sharpen.errors import InputError
from sharpen_kernels import TokenStats

WINDOWED = ["confidence_lowest", "confidence_bottom", "confidence_tail"]
# confidences 4, 1, 3, 5, 2 and 7
TOPK_MEAN = [-4.0, -1.0, -3.0, -5.0, -2.0, -7.0]


def scores(*completions):
    flat = torch.tensor([x for completion in completions for x in completion])
    return Scores.of(TokenStats(topk_mean=flat), [[len(x) for x in completions]])


def by_definition(name, topk_mean, window):
    """The windows of one completion, one at a time."""
    C, L = [-x for x in topk_mean], len(topk_mean)
    w = max(1, min(L, window if isinstance(window, int) else int(L * window)))
    means = [sum(C[i : i + w]) / w for i in range(L - w + 1)]
    n_bottom = max(1, len(means) // 10)
    return {
        "confidence_lowest": min(means),
        "confidence_bottom": sum(sorted(means)[:n_bottom]) / n_bottom,
        "confidence_tail": means[-1],
    }[name]


@pytest.mark.parametrize(
    ("name", "window", "want"),
    [
        # windows of two: 2.5, 2, 4, 3.5, 4.5
        ("confidence_lowest", 2, 2.0),
        ("confidence_tail", 2, 4.5),
        # half of six tokens are three: 8/3, 3, 10/3, 14/3
        ("confidence_lowest", 0.5, 8 / 3),
        ("confidence_tail", 0.5, 14 / 3),
        ("confidence_bottom", 0.5, 8 / 3),
        # a tenth of six tokens is at least one
        ("confidence_lowest", 0.1, 1.0),
        ("confidence_tail", 0.1, 7.0),
        # the paper's window is all of a short completion
        ("confidence_lowest", 2048, 22 / 6),
        ("confidence_tail", 2048, 22 / 6),
    ],
)
def test_hand_worked_windows(name, window, want):
    assert scores(TOPK_MEAN).reward(name, window=window).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("window", [1, 7, 2048, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_those_of_the_definition(name, window):
    rng = random.Random(0)
    completions = [[-5 * rng.random() for _ in range(L)] for L in (1, 2, 9, 10, 35, 200)]
    got = scores(*completions).reward(name, window=window).tolist()
    assert got == pytest.approx([by_definition(name, x, window) for x in completions], rel=1e-5)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_tenth_is_the_default_and_no_window_is_the_mean(name):
    rng = random.Random(1)
    one = scores([-5 * rng.random() for _ in range(40)])
    assert torch.equal(one.reward(name), one.reward(name, window=4))
    assert not torch.equal(one.reward(name), one.reward("confidence"))
    assert one.reward(name, window=1.0).item() == pytest.approx(one.reward("confidence").item())


@pytest.mark.parametrize("window", [0, -3, 0.0, 1.5, float("nan"), True])
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(InputError, match=r"`window` must be an int of at least 1 .*, got "):
        scores(TOPK_MEAN).reward("confidence_tail", window=window)
