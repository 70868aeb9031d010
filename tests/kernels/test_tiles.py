"""The table of tiles: every entry can be launched, every key has one."""

import dataclasses
import inspect

import pytest
import torch

from sharpen_kernels import _tiles

ARCHITECTURES = ["sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_no_tile_depends_on_the_number_of_rows():
    names = list(inspect.signature(_tiles.tile).parameters)
    assert names == ["op", "arch", "dtype", "D", "V"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "interpreter"])
def test_every_key_has_a_tile(arch, dtype):
    for D in (64, 896, 1024, 2048, 4096, 8192):
        for V in (204, 32_064, 151_936, 262_144):
            check(_tiles.tile("linear_logprob", arch, dtype, D, V))


def test_every_entry_can_be_launched():
    assert isinstance(_tiles.TABLE, dict)
    for key, tile in _tiles.TABLE.items():
        op, arch, dtype, d, v = key
        assert op == "linear_logprob"
        assert arch.startswith(("sm", "gfx"))
        assert dtype in ("bfloat16", "float16", "float32")
        assert d in {_tiles.d_class(D) for D in (1, 2048, 4096)}
        assert v in {_tiles.v_class(V) for V in (1, 10**6)}
        check(tile)


def check(tile):
    assert tile.route in ("fused", "chunk")
    for size in (tile.BLOCK_R, tile.BLOCK_V, tile.BLOCK_D, tile.PIECES, tile.PASS_PIECES):
        assert size & (size - 1) == 0
    # a tile never crosses a segment
    assert tile.SEGMENT % tile.BLOCK_V == 0
    assert min(tile.BLOCK_R, tile.BLOCK_V, tile.BLOCK_D) >= 16
    assert tile.PIECES <= 8
    assert tile.GROUP_R >= 1


def test_an_entry_of_the_table_wins(monkeypatch):
    entry = dataclasses.replace(_tiles.SINGLE, route="chunk")
    key = ("linear_logprob", "sm90", "bfloat16", "wide", "large")
    monkeypatch.setitem(_tiles.TABLE, key, entry)
    found = [
        _tiles.tile("linear_logprob", "sm90", torch.bfloat16, D, 128_256) for D in (4096, 8192)
    ]
    assert found == [entry, entry]
    assert _tiles.tile("linear_logprob", "sm90", torch.bfloat16, 896, 128_256) != entry


def test_launches_spell_out_fp_fusion():
    for sums in (True, False):
        assert _tiles.SINGLE.launch(sums=sums)["enable_fp_fusion"] is False


def test_every_tiling_of_tree_attention_keeps_the_promise_of_bits():
    for tiling in (*_tiles.TILING_TABLE.values(), *_tiles.TILINGS.values()):
        assert 128 % tiling.BLOCK_Q == 0
        assert 128 % tiling.BLOCK_K == 0
    for kernel, arch, is_single, size in _tiles.TILING_TABLE:
        assert (kernel, is_single, size) in _tiles.TILINGS
        assert arch.startswith(("sm", "gfx"))


def test_a_measured_tiling_wins_on_its_architecture_alone(monkeypatch):
    entry = _tiles.Tiling(16, 32, 4, 1)
    monkeypatch.setitem(_tiles.TILING_TABLE, ("fwd", "sm90", False, 64), entry)
    q = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    found = {}
    for arch in ("sm90", "sm80"):
        monkeypatch.setattr(_tiles, "architecture", lambda _, arch=arch: arch)
        found[arch] = _tiles.tiling_of("fwd", q, q)
    assert found == {"sm90": entry, "sm80": _tiles.TILINGS["fwd", False, 64]}
    assert _tiles.tiling_of("dq", q, q) == _tiles.TILINGS["dq", False, 64]
