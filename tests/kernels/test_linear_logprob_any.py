"""Any shapes, options, masks and targets: hypothesis draws them, fp64 judges."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import assert_matches_fp64, head_problem, values
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES

# the interpreter takes a second where a kernel takes microseconds
EXAMPLES = 12 if INTERPRETED else 60
fixed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def calls(draw, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    """Arguments of `head_problem`, then options of the op."""
    V = draw(st.integers(1, 300))
    sizes = {"R": draw(st.integers(1, 140)), "V": V, "D": draw(st.integers(1, 70))}
    sizes["S"] = draw(st.none() | st.integers(1, 30))
    sizes |= {"dtype": draw(st.sampled_from(dtypes)), "bias": draw(st.booleans())}
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.3, 4.0])),
        "softcap": draw(st.sampled_from([None, 3.0, 30.0])),
        "vocab_size": draw(st.none() | st.integers(1, V)),
        "renyi_order": draw(st.sampled_from([2.0, 0.5, 4.0])),
        "k": draw(st.integers(1, 32)),
    }
    return sizes, options, draw(st.sampled_from([0.0, 0.1, 0.9])), draw(st.integers(0, 2**31))


@given(call=calls())
@fixed
@pytest.mark.usefixtures("small_segments")
def test_any_call_is_as_accurate_as_torch(device, call):
    sizes, options, share_masked, seed = call
    torch.manual_seed(seed)
    problem = head_problem(**sizes, device=device)
    S, n_columns = len(problem["target"]), options["vocab_size"] or sizes["V"]
    problem["target"] %= n_columns
    odd = torch.rand(S, device=device)
    problem["target"][odd < 0.1] = -100
    problem["target"][odd > 0.95] = n_columns
    if share_masked:
        mask = torch.rand(sizes["V"], device=device) > share_masked
        mask[torch.randint(n_columns, ())] = True
        options = options | {"vocab_mask": mask}
    # a wrong formula or column is off by thousands of these
    assert_matches_fp64(problem, ulps=8, **options)


@given(call=calls(dtypes=(torch.float32, torch.bfloat16)), data=st.data())
@fixed
@pytest.mark.usefixtures("small_segments")
def test_any_part_of_a_batch_has_the_bits_of_the_whole(device, call, data):
    sizes, options, _, seed = call
    torch.manual_seed(seed)
    problem = head_problem(**sizes | {"S": None}, device=device)
    stats = tuple(data.draw(st.sets(st.sampled_from(NAMES), min_size=1)))
    start = data.draw(st.integers(0, sizes["R"] - 1))
    stop = data.draw(st.integers(start + 1, sizes["R"]))
    part = problem | {name: problem[name][start:stop] for name in ("hidden", "target")}
    whole = values(problem, **options)
    for name, x in values(part, stats, **options).items():
        assert torch.equal(x.nan_to_num(), whole[name][start:stop].nan_to_num()), name
