"""What `bench/` measures on a GPU, as far as it can be known without one."""

import json
import os
import subprocess
import tarfile

import pytest
import torch

from bench._measure import Timing
from bench.sharing_gpu import SHAPES, Found, Prompted, Task, model_of, rows_of, text_of, twin
from bench.tree_attention import TILE, AttentionRow, Problem, errors, n_tiles, truth, verdicts
from bench.tune import rewritten
from helpers.tree_oracle import TREES
from sharpen_kernels.tree import tree_mask
from sharpen_kernels.tree_attention import tree_attention_reference
from test_layers import ROOT

TRIE = Problem("trie", ((1, 150), (2, 70), (3, 40)), (4, 2), 16)
# subtrees end where tiles do
COUNTED = TREES | {
    "levels": TRIE.tree(),
    "whole tiles": Problem("", ((1, 256), (3, 128)), (1, 1), 16).tree(),
}


@pytest.mark.parametrize("name", COUNTED)
def test_tiles_are_counted_where_some_query_sees_some_key(name):
    tree = COUNTED[name]
    n = -(-tree.T // TILE)
    wide = torch.zeros(n * TILE, n * TILE, dtype=torch.bool)
    wide[: tree.T, : tree.T] = tree_mask(tree)
    assert n_tiles(tree) == int(wide.view(n, TILE, n, TILE).any(3).any(1).sum())


def test_levels_make_the_tree_they_name():
    tree = TRIE.tree()
    assert tree.T == 150 + 2 * 70 + 6 * 40
    assert [stop - start for start, stop, _ in tree.runs] == [150, *[70, 40, 40, 40] * 2]
    assert tree.position.max() == 150 + 70 + 40 - 1


def test_truth_is_the_reference_of_the_op():
    tree = TRIE.tree()
    inputs = TRIE.inputs(tree.T, torch.float64, "cpu")
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = tree_attention_reference(*leaves, tree)
    got = out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)
    found = errors(got, truth(inputs, tree))
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(found.values()) < 1e-12
    off = errors((got[0] * 1.01, *got[1:]), truth(inputs, tree))
    assert off["out"] == pytest.approx(0.01)


def attention_row(impl, kind, median_us, rate):
    return AttentionRow(
        op="tree_attention forward",
        impl=impl,
        kind=kind,
        shape="s",
        dtype="bfloat16",
        median_us=median_us,
        spread=0.0,
        rounds=5,
        tflop_per_s=rate,
        peak_extra_mib=0.0,
        machine={},
    )


def test_goals_of_attention_are_of_flash_attn_where_it_is():
    rows = [
        attention_row("ours", "ours", 10.0, 300.0),
        attention_row("FlexAttention", "exact", 15.0, 200.0),
        attention_row("causal, SDPA flash", "floor", 8.0, 375.0),
    ]
    assert [line.split(" (")[0] for line in verdicts(rows)] == [
        "  goal: 0.80 of the rate of causal, SDPA flash",
        "  goal: 1.50 x as fast as FlexAttention",
    ]
    rows.append(attention_row("causal, flash-attn 3", "floor", 5.0, 600.0))
    assert "0.50 of the rate of causal, flash-attn 3" in verdicts(rows)[0]


def test_a_twin_has_the_parameters_and_nothing_else():
    model = model_of("tiny", "cpu", torch.float32)
    other = twin(model)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a is b
    assert model.config is not other.config
    assert all(a is not b for a, b in zip(model.modules(), other.modules(), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_of_the_parameters(name):
    sizes = SHAPES[name]
    with torch.device("meta"):
        model = model_of.__wrapped__(name, "meta", torch.float32)
    matrices = sum(p.numel() for n, p in model.named_parameters() if "proj.weight" in n)
    one = Prompted(name, 1, 1, 1)
    head = sizes["hidden_size"] * sizes["vocab_size"]
    attention = 4 * sizes["hidden_size"] * sizes["num_hidden_layers"] * 3  # pairs
    assert one.flops(shared=True) == 2 * (2 * matrices + head) + attention
    assert one.tokens(shared=True) == one.tokens(shared=False) == 2


def test_savings_are_of_what_the_tokens_promise():
    task = Task("forward", Prompted("tiny", 30, 10, 4), 64)
    # eight, four and two seconds: 160 tokens against 70 promise 2.29 times
    seconds = {"padded batch": 8.0, "ours": 4.0, "DynamicCache": 2.0}
    timings = {n: Timing((s,) * 3, 0.0, torch.zeros(1)) for n, s in seconds.items()}
    rows = {r.impl: r for r in rows_of(task, Found(timings, {}, {}, {}), "cpu", "float32")}
    assert [rows[name].tokens for name in seconds] == [160, 70, 66]
    assert rows["ours"].speedup == 2.0
    assert rows["ours"].of_tokens == pytest.approx(2 * 70 / 160)
    assert rows["DynamicCache"].of_tokens == pytest.approx(4 * 70 / 160)
    assert rows["padded batch"].of_tokens == pytest.approx(70 / 160)
    text = text_of(task, list(rows.values()), {"x": "no GPU"})
    assert "ours: 2.00 x padded batch, 70 tokens a call, 0.88 of the 2.29 x in tokens" in text
    assert "missing, no GPU: x" in text


def test_a_table_of_tiles_keeps_its_name_and_type():
    source = "a = 1\n# <table of x>\nTABLE: dict[int, str] = {}\n# </table of x>\nb = 2\n"
    filled = rewritten(source, "x", {2: "y", 1: "x"})
    assert "TABLE: dict[int, str] = {\n    1: 'x',\n    2: 'y',\n}\n# </table of x>\nb" in filled
    assert rewritten(filled, "x", {}) == source


FAKE = """#!/usr/bin/env bash
# a Python that has a GPU and pytest, whose steps say what they are asked and partly fail
if [ "$1" = - ]; then cat >/dev/null; echo '{}'; exit 0; fi
if [ "$1" = -c ]; then case "$2" in *xdist*|*pytest_benchmark*) exit 1;; esac; exit 0; fi
for last; do :; done
case "$*" in
  *tree_attention*--seconds*) echo '{"row": 1}' >>"$last"; echo "  goal: 0.71 of the rate";;
  *sharing_gpu*--seconds*) echo '{"row": 2}' >>"$last"; echo "sharing forward, x"; exit 3;;
esac
"""


def test_gpu_checklist_goes_on_behind_a_step_that_fails(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE)
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "bench/gpu.sh", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    told = (out / "summary.txt").read_text()
    assert done.returncode == 1, done.stderr
    assert "sharing: FAILED with 3, see sharing.log" in told
    assert told.count(": ok, ") == 14
    assert "fsdp: ok" in told
    assert "server: ok" in told
    assert told.splitlines()[-1].startswith("speed: ok")
    assert done.stdout.endswith("  goal: 0.71 of the rate\nsharing forward, x\n")
    assert [json.loads((out / f"{name}.jsonl").read_text())["row"] for name in ("tree", "sharing")]
    # no more files than a machine gives back
    assert len(list(out.iterdir())) <= 8
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"device.log", "sharing.log", "_tiles.py"} <= set(logs.getnames())
