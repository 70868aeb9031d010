"""The lists of tiles that meet, against the dense mask; and tiles smaller than every run."""

import pytest
import torch

from helpers.tree_oracle import TREES, assert_matches_fp64, attention_problem, tree_of
from sharpen_kernels import _tiles as tiles
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.tree import Tree, tree_mask

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="lists are of the Triton kernels"
)
SMALL = tiles.Tiling(32, 16, 4, 1)
LONG = tree_of((150, 60, (40, 70, 9)), (33, 64))


def tiled(mask, tiling):
    """For each tile of queries and of keys, how many of its pairs see each other."""
    T = len(mask)
    rows, cols = -(-T // tiling.BLOCK_Q), -(-T // tiling.BLOCK_K)
    wide = torch.zeros(rows * tiling.BLOCK_Q, cols * tiling.BLOCK_K, device=mask.device)
    wide[:T, :T] = mask
    return wide.view(rows, tiling.BLOCK_Q, cols, tiling.BLOCK_K).sum(dim=(1, 3)).long()


@pytest.mark.parametrize("of_queries", [True, False])
@pytest.mark.parametrize("window", [None, 5, 40, 70, 100])
@pytest.mark.parametrize("tree", [LONG, TREES["a trie of four levels"], Tree.chain([200])])
def test_each_tile_is_met_once_and_free_where_all_is_seen(tree, window, of_queries, device):
    tree = tree.to(device)
    pairs = tiled(tree_mask(tree, window), SMALL)
    pairs = pairs if of_queries else pairs.T
    from sharpen_kernels._tree_attention_triton import lists_of

    others, lengths = lists_of(tree.end, tree.position, window, SMALL, of_queries)
    for tile, seen in enumerate(pairs):
        free, masked = (others[plane, tile, : lengths[plane, tile]].tolist() for plane in (0, 1))
        assert free == sorted(free)
        assert masked == sorted(masked)
        assert not set(free) & set(masked)
        full = SMALL.BLOCK_Q * SMALL.BLOCK_K
        assert all(seen[other] == full for other in free)
        assert set(seen.nonzero().flatten().tolist()) <= {*free, *masked}
        if window is None:
            # nothing is read in vain: what needs no mask is free, what meets nothing is skipped
            assert {*free, *masked} == set(seen.nonzero().flatten().tolist())
            assert free == (seen == full).nonzero().flatten().tolist()


@pytest.mark.parametrize("window", [None, 40, 100])
def test_tiles_smaller_than_every_run(window, monkeypatch, device):
    for kernel in ("fwd", "dq", "dkv"):
        monkeypatch.setitem(tiles.TILINGS, (kernel, True, 64), SMALL)
    problem = attention_problem(LONG, heads=(2, 1), device=device)
    assert_matches_fp64(problem, window=window)
