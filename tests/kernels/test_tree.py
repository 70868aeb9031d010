"""The tree of a packed row against walks from every token to its root."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpen_kernels.tree import Run, Tree, tree_mask


@st.composite
def parents(draw, max_tokens=40):
    """Parents in depth-first order: each token hangs on the open path, or is a root."""
    path, found = [], []
    for k in range(draw(st.integers(0, max_tokens))):
        depth = draw(st.one_of(st.just(len(path)), st.integers(0, len(path))))
        del path[depth:]
        found.append(path[-1] if path else -1)
        path.append(k)
    return found


def walk(parent, k):
    """Token k and its ancestors, itself first."""
    while k != -1:
        yield k
        k = parent[k]


@settings(deadline=None, max_examples=200)
@given(parent=parents(), window=st.one_of(st.none(), st.integers(1, 12)))
def test_mask_is_the_ancestors_inside_the_window(parent, window):
    T = len(parent)
    want = torch.zeros(T, T, dtype=torch.bool)
    for q in range(T):
        for k in list(walk(parent, q))[:window]:
            want[q, k] = True
    assert torch.equal(tree_mask(Tree.of(torch.tensor(parent, dtype=torch.int64)), window), want)


@settings(deadline=None, max_examples=200)
@given(parent=parents())
def test_position_and_runs_are_those_of_the_walks(parent):
    tree = Tree.of(torch.tensor(parent, dtype=torch.int64))
    assert len(parent) == tree.T
    assert tree.position.tolist() == [len(list(walk(parent, k))) - 1 for k in range(tree.T)]
    assert [k for run in tree.runs for k in range(run.start, run.stop)] == list(range(tree.T))
    for run in tree.runs:
        assert all(parent[k] == k - 1 for k in range(run.start + 1, run.stop))
        assert parent.count(run.stop - 1) != 1, "a run goes on to the next fork or leaf"
        assert (run.end == run.stop) == (run.stop - 1 not in parent)
        assert tree.end[run.start : run.stop].eq(run.end).all()
    assert tree.table.tolist() == [list(run) for run in tree.runs]


def test_prompt_with_two_completions():
    tree = Tree.of(torch.tensor([-1, 0, 1, 2, 1]))
    assert tree.runs == (Run(0, 2, 5), Run(2, 4, 4), Run(4, 5, 5))
    assert tree.end.tolist() == [5, 5, 4, 4, 5]
    assert tree.position.tolist() == [0, 1, 2, 3, 2]


def test_chain_is_plain_packing_and_skips_empty_sequences():
    tree, other = Tree.chain([3, 0, 1]), Tree.of(torch.tensor([-1, 0, 1, -1]))
    assert tree.runs == other.runs == (Run(0, 3, 3), Run(3, 4, 4))
    assert torch.equal(tree.end, other.end)
    assert torch.equal(tree.position, other.position)


@pytest.mark.parametrize("tree", [Tree.chain([]), Tree.of(torch.zeros(0, dtype=torch.int64))])
def test_empty_row(tree):
    assert (tree.T, tree.runs, tree.table.shape) == (0, (), (0, 3))
    assert tree_mask(tree).shape == (0, 0)


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ([0], r"`parent\[0\]` must be in -1..-1, a token before it in the row, got 0"),
        ([-1, -2], r"`parent\[1\]` must be in -1..0, .* got -2"),
        ([-1, 2, 0], r"`parent\[1\]` must be in -1..0, .* got 2"),
        ([-1, -1, 0], r"`parent\[2\]` must be token 1, .* got 0, whose subtree has ended"),
        ([-1, 0, 0, 1], r"`parent\[3\]` must be token 2, .* got 1, whose subtree has ended"),
        ([-1, 0, 1, -1, 2], r"`parent\[4\]` must be token 3, .* got 2"),
    ],
)
def test_parents_out_of_order_are_refused(parent, message):
    with pytest.raises(ValueError, match=message):
        Tree.of(torch.tensor(parent))


def test_errors_name_the_argument_and_the_fix():
    with pytest.raises(ValueError, match=r"`parent` must be 1-D, got shape \(1, 1\)"):
        Tree.of(torch.tensor([[-1]]))
    with pytest.raises(TypeError, match=r"`parent` must be one of torch.int64, got torch.int32"):
        Tree.of(torch.tensor([-1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"`lengths` must be at least 0, got \[2, -1\]"):
        Tree.chain([2, -1])


def test_moves_with_its_tensors(device):
    tree = Tree.of(torch.tensor([-1, 0])).to(device)
    assert tree.end.device.type == tree.position.device.type == device
    assert tree.table.device.type == "cpu"
