"""Any call of `token_logprob`, drawn at random, is as accurate as PyTorch's own fp32."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from logit_oracle import logit_problem, values_and_gradient
from oracle import assert_as_accurate
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES
from sharpen_kernels.token_logprob import token_logprob, token_logprob_reference

INF = float("inf")
# those whose value does not hang on the last bit of a logit, which a mask may leave few of
NUMBERS = tuple(name for name in NAMES if name not in ("margin", "topk", "topk_id", "topk_mean"))


@st.composite
def calls(draw):
    """Shapes, options and masks of a call; no row without a column."""
    R, V = draw(st.integers(1, 3)), draw(st.integers(1, 290))
    n_columns = draw(st.integers(1, V))
    options = {
        "vocab_size": n_columns,
        "temperature": draw(st.sampled_from([1.0, 0.3, 2.0])),
        "softcap": draw(st.sampled_from([None, 8.0])),
        "renyi_order": draw(st.sampled_from([0.5, 2.0, 3.0])),
        "stats": tuple(draw(st.sets(st.sampled_from(NUMBERS), min_size=1))),
    }
    kept = draw(st.sets(st.integers(0, n_columns - 1), min_size=1))
    return {
        "R": R, "V": V, "S": draw(st.integers(1, 4)), "seed": draw(st.integers(0, 99)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "mask": draw(st.sampled_from(["none", "logits", "vocab_mask"])), "kept": sorted(kept),
        "pad": draw(st.integers(0, 3)), "offset": draw(st.sampled_from([0.0, -90.0, 40.0])),
        "options": options,
    }  # fmt: skip


@settings(
    max_examples=12 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls())
@pytest.mark.usefixtures("small_tiles")
def test_any_call(call, device):
    torch.manual_seed(call["seed"])
    R, V, kept, options = call["R"], call["V"], call["kept"], dict(call["options"])
    # rows that begin at any address
    problem = logit_problem(R, V + call["pad"], S=call["S"], device=device)
    # a cap makes ties of what is far out
    offset = call["offset"] if options["softcap"] is None else 0.0
    logits = (problem["logits"] + offset).to(call["dtype"])[:, call["pad"] :]
    mask = torch.zeros(V, dtype=torch.bool, device=device)
    mask[kept] = True
    if call["mask"] == "none":
        problem["target"] %= options["vocab_size"]
    else:
        problem["target"] = torch.tensor(kept, device=device)[problem["target"] % len(kept)]
    if call["mask"] == "logits":
        logits = logits.masked_fill(~mask, -INF)
    if call["mask"] == "vocab_mask":
        options["vocab_mask"] = mask
    problem["logits"] = logits
    got = values_and_gradient(token_logprob, problem, **options)
    low = values_and_gradient(token_logprob_reference, problem, dtype=torch.float32, **options)
    truth = values_and_gradient(token_logprob_reference, problem, dtype=torch.float64, **options)
    # one value may be right by luck: two units in the last place of the largest logit are not
    largest = max(1.0, logits[logits.isfinite()].abs().max().item()) / options["temperature"]
    for name, x in got.items():
        finite = truth[name][truth[name].isfinite()].double()
        size = max(1.0, finite.abs().sum().item())
        eps = torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
        assert_as_accurate(name, x, low[name], truth[name], floor=2 * eps * largest * size)
