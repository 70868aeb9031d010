"""TRL's operations, fused: values and gradients beside PyTorch's, at every shape they take."""

import pytest
import torch

from helpers.oracle import assert_as_accurate
from sharpen.errors import InputError
from sharpen.integrations.trl import (
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)


def plain(logits, index, T=1.0, row_mask=None):
    """Log-probs and entropies as the formulas say."""
    log_p = (logits / T).log_softmax(-1)
    wide = index if index.ndim == logits.ndim else index[..., None]
    found = log_p.gather(-1, wide).view(index.shape)
    p_log_p = log_p.exp() * log_p
    entropy = -p_log_p.masked_fill(log_p == -torch.inf, 0).sum(-1)
    if row_mask is not None:
        found = found.masked_fill(row_mask == 0, 0)
        entropy = entropy.masked_fill(row_mask == 0, 0)
    return found, entropy


def make(*shape, dtype=torch.float32):
    logits = (3 * torch.randn(*shape, 300)).to(dtype)
    return logits, torch.randint(300, shape)


def run(function, logits, index, *rest):
    """Values of a function, and the gradient of a fixed sum of them."""
    leaf = logits.detach().clone().requires_grad_()
    found = function(leaf, index, *rest)
    found = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in found)
    return *(x.detach() for x in found), torch.autograd.grad(loss, leaf)[0]


def judged(ours, theirs, logits, *rest):
    parts = run(ours, logits, *rest), run(theirs, logits, *rest)
    truth = run(theirs, logits.double(), *rest)
    for i, (got, low, true) in enumerate(zip(*parts, truth, strict=True)):
        assert_as_accurate(str(i), got, low, true, floor=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("T", [1.0, 0.4])
def test_log_probs(shape, T):
    judged(
        lambda x, i: selective_log_softmax(x, i, T), lambda x, i: plain(x, i, T)[0], *make(*shape)
    )


@pytest.mark.parametrize("K", [0, 1, 5])
def test_several_ids_a_row(K):
    logits, _ = make(3, 4)
    index = torch.randint(300, (3, 4, K))
    judged(selective_log_softmax, lambda x, i: plain(x, i)[0], logits, index)


@pytest.mark.parametrize("T", [1.0, 1.7])
def test_log_probs_and_entropies(T):
    def ours(x, i):
        return selective_log_softmax_and_entropy(x, i, temperature=T)

    judged(ours, lambda x, i: plain(x, i, T), *make(3, 5))


def test_entropies_alone():
    judged(lambda x, _: entropy_from_logits(x), lambda x, i: plain(x, i)[1], *make(2, 6))


def test_an_entropy_without_gradient():
    logits, index = make(4)
    leaf = logits.requires_grad_()
    logprob, entropy = selective_log_softmax_and_entropy(leaf, index, False)
    assert logprob.requires_grad
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, plain(logits, index)[1])


def test_masked_rows_are_not_read():
    logits, index = make(2, 3)
    row_mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    # a row that would be NaN if it was read
    logits[0, 1] = float("nan")
    found = run(
        lambda x, i: selective_log_softmax_and_entropy(x, i, row_mask=row_mask), logits, index
    )
    for x in found:
        assert x.isfinite().all()
        assert x[row_mask == 0].eq(0).all()
    want = plain(logits, index, row_mask=row_mask)[0]
    torch.testing.assert_close(found[0][row_mask == 1], want[row_mask == 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_fp32(dtype):
    logits, index = make(3, 5, dtype=dtype)
    got = selective_log_softmax_and_entropy(logits, index)
    for x, want in zip(got, plain(logits.double(), index), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, want.float(), rtol=0, atol=5e-6)


def test_fp64_stays_fp64():
    logits, index = make(3, dtype=torch.float64)
    got = selective_log_softmax(logits, index)
    torch.testing.assert_close(got, plain(logits, index)[0], rtol=0, atol=1e-12)


def test_masked_columns_count_nothing():
    logits, index = make(5)
    logits[:, 100:] = -torch.inf
    index %= 100
    logprob, entropy = selective_log_softmax_and_entropy(logits, index)
    want = plain(logits, index)
    torch.testing.assert_close(logprob, want[0])
    torch.testing.assert_close(entropy, want[1])


@pytest.mark.parametrize("bad", [-100, -1, 300])
def test_an_id_outside_the_vocabulary_is_nan_alone(bad):
    logits, index = make(3)
    index[1] = bad
    assert selective_log_softmax(logits, index).isnan().tolist() == [False, True, False]


def test_empty():
    logits, index = make(0, 4)
    assert selective_log_softmax(logits, index).shape == (0, 4)
    assert entropy_from_logits(logits).shape == (0, 4)


def test_errors():
    logits, index = make(3, 4)
    with pytest.raises(InputError, match="`temperature` must be above 0"):
        selective_log_softmax(logits, index, 0.0)
    with pytest.raises(InputError, match=r"`index` must be \(3, 4\)"):
        selective_log_softmax(logits, index[:2])
    with pytest.raises(InputError, match="one id a row"):
        selective_log_softmax_and_entropy(logits, index[..., None])
    for function in (selective_log_softmax, selective_log_softmax_and_entropy):
        for shape in ((3,), (4, 3), (3, 5), (3, 4, 1)):
            with pytest.raises(InputError, match=r"`row_mask` must be .* `index`, \(3, 4\), got"):
                function(logits, index, row_mask=torch.ones(shape))
