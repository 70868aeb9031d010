"""One decoding step against dense attention of each row alone, in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharpen_kernels.prefix_attention import PrefixRows, prefix_attention


def dense(q, k, v, softcap, sinks, scale):
    """[B, H, Kv] of one query a row with all its keys [B, H, T, K]."""
    z = (q[:, :, None] @ k.mT)[:, :, 0] * (q.shape[2] ** -0.5 if scale is None else scale)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if sinks is not None:
        z = torch.cat([z, sinks.to(z.dtype).expand(len(z), -1)[..., None]], -1)
    weight = z.softmax(-1)[..., : k.shape[2]]
    return (weight[:, :, None] @ v)[:, :, 0]


def whole(prefix, own, counts, group):
    """What each row sees: its prefix, then its own, for each query head."""
    repeated = prefix.repeat_interleave(torch.tensor(counts), dim=0)
    return torch.cat([repeated, own], dim=2).repeat_interleave(group, dim=1)


def problem(counts, Hkv, group, P, L, K, Kv, dtype=torch.float32, seed=0):  # noqa: PLR0913
    generator = torch.Generator().manual_seed(seed)
    B, G = sum(counts), len(counts)
    shapes = (
        (B, Hkv * group, K),
        (G, Hkv, P, K),
        (G, Hkv, P, Kv),
        (B, Hkv, L, K),
        (B, Hkv, L, Kv),
    )
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def want_of(tensors, counts, group, dtype, **options):
    q, *keys = (x.to(dtype) for x in tensors)
    k, v = (whole(*pair, counts, group) for pair in (keys[::2], keys[1::2]))
    given = {"softcap": None, "sinks": None, "scale": None} | options
    return dense(q, k, v, **given)


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    Hkv=st.integers(1, 3),
    group=st.integers(1, 4),
    P=st.sampled_from([0, 1, 7, 130]),
    L=st.sampled_from([1, 2, 33]),
    widths=st.sampled_from([(8, 8), (24, 12), (1, 3)]),
    options=st.fixed_dictionaries(
        {
            "softcap": st.sampled_from([None, 5.0]),
            "sinks": st.booleans(),
            "scale": st.sampled_from([None, 0.3]),
        }
    ),
)
def test_it_is_attention_of_each_row_alone(counts, Hkv, group, P, L, widths, options):
    options["sinks"] = torch.linspace(-1, 2, Hkv * group) if options["sinks"] else None
    error = floor = 0.0
    # one worst number of few rows would compare two accidents
    for seed in range(8):
        tensors = problem(counts, Hkv, group, P, L, *widths, seed=seed)
        got = prefix_attention(*tensors, PrefixRows.of(counts), **options)
        want = want_of(tensors, counts, group, torch.float64, **options)
        theirs = want_of(tensors, counts, group, torch.float32, **options)
        assert got.dtype == torch.float32
        error = max(error, float((got - want).abs().max()))
        floor = max(floor, float((theirs - want).abs().max()))
    assert error <= 2 * floor + 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_pytorch(dtype):
    counts, group = [5, 2], 2
    tensors = problem(counts, 2, group, 50, 9, 16, 16, dtype)
    got = prefix_attention(*tensors, PrefixRows.of(counts))
    want = want_of(tensors, counts, group, torch.float64)
    theirs = want_of(tensors, counts, group, dtype)
    assert (got - want).abs().max() <= 1.5 * (theirs - want).abs().max()


def test_views_are_taken_as_they_are():
    q, pk, pv, k, v = problem([3], 2, 2, 9, 12, 8, 8)
    rows = PrefixRows.of([3])
    want = prefix_attention(
        q,
        pk[:, :, 4:].clone(),
        pv[:, :, 4:].clone(),
        k[:, :, 2:7].clone(),
        v[:, :, 2:7].clone(),
        rows,
    )
    got = prefix_attention(q, pk[:, :, 4:], pv[:, :, 4:], k[:, :, 2:7], v[:, :, 2:7], rows)
    assert torch.equal(got, want)


def test_a_nan_stays_in_its_row():
    q, pk, pv, k, v = problem([2, 3], 1, 2, 5, 4, 8, 8)
    rows = PrefixRows.of([2, 3])
    want = prefix_attention(q, pk, pv, k, v, rows)
    k = k.clone()
    k[1, 0, 2, 0] = float("nan")
    got = prefix_attention(q, pk, pv, k, v, rows)
    assert got[1].isnan().all()
    keep = [0, 2, 3, 4]
    assert torch.equal(got[keep], want[keep])


def test_bad_input():
    q, pk, pv, k, v = problem([2], 2, 2, 5, 4, 8, 8)
    rows = PrefixRows.of([2])
    with pytest.raises(ValueError, match=r"`rows.place` must have shape \(B\)=\(2,\), got \(3,\)"):
        prefix_attention(q, pk, pv, k, v, PrefixRows.of([3]))
    with pytest.raises(TypeError, match="`own_v` must be one of"):
        prefix_attention(q, pk, pv, k, v.half(), rows)
    with pytest.raises(ValueError, match="`own_k` must hold the query's own key"):
        prefix_attention(q, pk, pv, k[:, :, :0], v[:, :, :0], rows)
    with pytest.raises(ValueError, match="multiple of the 2 heads"):
        prefix_attention(q[:, :3], pk, pv, k, v, rows)
    with pytest.raises(ValueError, match="`softcap` must be above 0"):
        prefix_attention(q, pk, pv, k, v, rows, softcap=0.0)
    with pytest.raises(ValueError, match="`counts` must be at least 0 with a row in all"):
        PrefixRows.of([0])
