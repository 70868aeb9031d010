"""`vocab_parallel_linear_logprob` on two gloo ranks, and alone."""

import re

import pytest
import torch
import torch.distributed as dist

from helpers.oracle import LEAVES, head_problem, values, values_and_gradients
from helpers.two_ranks import Ranks, assert_found_matches_fp64, each_its_own, score
from sharpen_kernels import linear_logprob, vocab_parallel_linear_logprob
from sharpen_kernels.linear_logprob import linear_logprob_reference
from sharpen_kernels.stats import NAMES

OP = torch.ops.sharpen.vocab_parallel_linear_logprob
SHARDED = ("dweight", "dbias")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("gloo"))
    yield ranks
    ranks.close()


@pytest.fixture
def alone():
    """A default group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def both(ranks, problem, sizes, stats=NAMES, **options):
    """Values and gradients that both ranks agree on to the bit."""
    first, second = ranks.call(score, problem, sizes, stats, options)
    for name, x in first.items():
        if name in SHARDED:
            assert not x[sizes[0] :].any()
            assert not second[name][: sizes[0]].any()
            first[name] = x + second[name]
        else:
            assert torch.equal(x.nan_to_num(123.0), second[name].nan_to_num(123.0)), name
    return first


def assert_ranks_match_fp64(ranks, problem, sizes, stats=NAMES, **options):
    got = both(ranks, problem, sizes, stats, **options)
    assert_found_matches_fp64(got, problem, stats, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(250, 50), (1, 299), (300, 0), (0, 300)], ids=str)
def test_every_statistic_and_gradient(sizes, dtype, ranks):
    problem = head_problem(20, 300, 24, S=33, dtype=dtype, bias=True)
    assert_ranks_match_fp64(ranks, problem, sizes)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 2.5, "softcap": 30.0, "k": 3}],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_options(options, bias, ranks):
    problem = head_problem(20, 200, 24, bias=bias)
    assert_ranks_match_fp64(ranks, problem, (120, 80), **options)


# in the last shard; all of the last shard; some of the first too
@pytest.mark.parametrize("vocab_size", [170, 120, 90])
def test_padding(vocab_size, ranks):
    problem = head_problem(20, 200, 24, bias=True)
    problem["target"] %= vocab_size
    problem["weight"][vocab_size:] = 50.0
    problem["bias"][vocab_size:] = 1e3
    assert_ranks_match_fp64(ranks, problem, (120, 80), vocab_size=vocab_size)


@pytest.mark.parametrize("masked", [slice(0, 120), slice(120, 200), slice(60, 130)], ids=str)
def test_masked_shard(masked, ranks):
    problem = head_problem(20, 200, 24, bias=True)
    mask = torch.ones(200, dtype=torch.bool)
    mask[masked] = False
    assert_ranks_match_fp64(ranks, problem, (120, 80), vocab_mask=mask, softcap=9.0)


def test_targets_outside_or_ignored(ranks):
    problem = head_problem(6, 90, 8, bias=True)
    problem["target"] = torch.tensor([3, 89, -100, 90, -1, 30])
    problem["hidden"][2] = float("nan")
    got = both(ranks, problem, (30, 60))
    want = values_and_gradients(linear_logprob, problem)
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], equal_nan=True, msg=name)
    assert (got["dhidden"][2:5] == 0).all()
    assert (got["dhidden"][[0, 1, 5]] != 0).any(dim=1).all()


def test_ties_across_ranks_go_to_the_lowest_column(ranks):
    problem = head_problem(20, 90, 3)
    # exact in fp32
    problem |= {
        name: torch.randint(-2, 3, problem[name].shape).float() for name in ("hidden", "weight")
    }
    ids = ("top1", "topk_id", "rank", "is_greedy", "margin")
    got = both(ranks, problem, (40, 50), ids)
    want = values(problem, ids, fn=linear_logprob_reference)
    assert all(torch.equal(got[name], want[name]) for name in ids)
    assert (want["margin"] == 0).sum() > 5


def test_bf16_gradient_of_hidden_is_rounded_once(ranks):
    problem = head_problem(20, 200, 24, dtype=torch.bfloat16)
    got = both(ranks, problem, (100, 100), ("logprob",))["dhidden"]
    asked = linear_logprob_reference, problem, ("logprob",), torch.float64
    truth = values_and_gradients(*asked)["dhidden"]
    assert ((got.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all()


def test_any_batch_has_the_same_bits(ranks):
    problem = head_problem(70, 300, 16)
    whole = both(ranks, problem, (200, 100))
    for row in (0, 69):
        one = problem | {name: problem[name][row : row + 1] for name in ("hidden", "target")}
        got = both(ranks, one, (200, 100))
        assert all(torch.equal(got[name][0], whole[name][row]) for name in NAMES)


def test_hidden_gradient_may_be_left_unsummed(ranks):
    problem = head_problem(5, 90, 8)
    found = [
        ranks.call(score, problem, (50, 40), ("logprob",), {"reduce_hidden_grad": x})
        for x in (True, False)
    ]
    (whole, _), parts = found
    torch.testing.assert_close(parts[0]["dhidden"] + parts[1]["dhidden"], whole["dhidden"])
    assert not torch.equal(parts[0]["dhidden"], whole["dhidden"])


def test_shards_given_are_not_asked_for(ranks):
    problem = head_problem(5, 90, 8)
    given = both(ranks, problem, (50, 40), shards=(50, 40))
    asked = both(ranks, problem, (50, 40))
    assert all(torch.equal(x, asked[name]) for name, x in given.items())


hidden, weight = torch.zeros(3, 4), torch.zeros(9, 4)
CALL = {"hidden": hidden, "weight": weight, "target": torch.zeros(3, dtype=torch.int64)}
MORE = {"hidden": torch.zeros(5, 4), "target": torch.zeros(5, dtype=torch.int64)}
OTHER = CALL | {"hidden": torch.eye(3, 4)}
FORKS = CALL | {"rows": torch.zeros(3, dtype=torch.int64)}
BAD = [
    (MORE, {}, r"the shape of `hidden` must be the same .*, got \[\(3, 4\), \(5, 4\)\]; give"),
    ({"target": torch.zeros(2).long(), "rows": torch.zeros(2).long()}, {}, r"length of `target`"),
    ({}, {"temperature": 2.0}, r"dtypes and options must be the same on every rank"),
    ({"weight": weight.double()}, {}, r"dtypes and options must be the same"),
    ({"bias": weight[:, 0]}, {}, r"dtypes and options must be the same"),
    ({"weight": weight[:, :2]}, {}, r"the arguments of ranks \[1\] are wrong|`weight` must have"),
    ({}, {"softcap": -1.0}, r"the arguments of ranks \[1\] are wrong|`softcap` must be"),
]


@pytest.mark.parametrize(("change", "options", "message"), BAD, ids=[m for *_, m in BAD])
def test_what_one_rank_does_wrong_raises_on_both(change, options, message, ranks):
    errors = ranks.errors(each_its_own, [CALL, CALL | change], [{}, options])
    for error in errors:
        assert error is not None
        assert error[0] is ValueError
        assert re.search(message, error[1])


def test_other_rows_are_found_where_asked(ranks):
    for problems in ([CALL, OTHER], [CALL, CALL | {"target": CALL["target"] + 1}]):
        asked = [{"check_replicated": True}] * 2
        for error in ranks.errors(each_its_own, problems, asked):
            assert error is not None
            assert "`hidden`, `target` and `rows` must be the same on every rank" in error[1]
    turned = FORKS | {"hidden": torch.zeros(4, 3).T}
    ranks.call(each_its_own, [FORKS, turned], [{"check_replicated": True}] * 2)


def test_shards_must_hold_the_vocabulary(ranks):
    for error in ranks.errors(each_its_own, [CALL, CALL], [{"vocab_size": 19}] * 2):
        assert error is not None
        assert "add up to `vocab_size`=19 or more, got [9, 9], 18 in all" in error[1]
    for error in ranks.errors(each_its_own, [CALL, CALL], [{"shards": (8, 9)}, {"shards": (9,)}]):
        assert error is not None
        assert "`shards` must be the rows of `weight` on each of 2 ranks, 9 on rank" in error[1]


def test_no_group_says_what_to_do():
    message = r"`group` must be a process group, got None and no default .*init_process_group"
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_logprob(**CALL)


ONES = torch.ones(40, dtype=torch.bool)
WRONG = [
    ({"vocab_mask": ONES}, r"`vocab_mask` must have shape \(v\)=\(9,\)"),
    ({"vocab_mask": ONES[:9].to("meta")}, r"`vocab_mask` must be on cpu"),
    ({"vocab_size": 0}, r"`vocab_size` must be at least 1, got 0"),
]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_errors_say_name_wanted_got_fix(change, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_logprob(**CALL | change)


@pytest.mark.usefixtures("alone")
def test_alone_it_has_the_bits_of_linear_logprob():
    problem = head_problem(6, 300, 24, S=11, bias=True)
    got = values_and_gradients(vocab_parallel_linear_logprob, problem)
    want = values_and_gradients(linear_logprob, problem)
    assert all(torch.equal(x, want[name]) for name, x in got.items())


@pytest.mark.usefixtures("alone")
def test_opcheck():
    problem = head_problem(4, 50, 8, S=6, bias=True)
    problem["target"] %= 45
    names = ("hidden", "weight", "target", "rows", "bias")
    fixed = [problem[name] for name in names]
    leaves = [
        x.clone().requires_grad_() if name in LEAVES else x
        for name, x in zip(names, fixed, strict=True)
    ]
    group = dist.group.WORLD.group_name
    options = None, 0.7, 9.0, 45, -100, "logprob,entropy,topk", 2.0, 3, group, None, False, True
    torch.library.opcheck(OP, (*leaves, *options))
    *found, state, place = OP(*fixed, *options)
    bwd = torch.ones_like(found[0]), state, place, *fixed, None, 0.7, 9.0, -100
    needs = [True, False, True]
    torch.library.opcheck(
        torch.ops.sharpen.vocab_parallel_linear_logprob_bwd,
        (*bwd, "logprob,entropy", group, True, needs),
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("fn", [linear_logprob, vocab_parallel_linear_logprob])
def test_traces_without_a_graph_break(fn):
    problem = head_problem(4, 50, 8)

    def gradient(fn):
        x = problem["hidden"].clone().requires_grad_()
        return torch.autograd.grad(fn(x), x)[0]

    def loss(x):
        found = values(problem | {"hidden": x}, ("logprob", "entropy"), fn=fn)
        return found["logprob"].sum() + found["entropy"].sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(compiled), gradient(loss))
