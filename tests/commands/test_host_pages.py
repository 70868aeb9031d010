"""Pages of docs/hosts that need no host: their examples run as they stand."""

import ast
import shlex

from helpers.completions_server import serving
from helpers.other_pythons import ROOT, code_block
from sharpen.cli import main


def test_the_commands_of_the_parity_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = code_block("parity.md", language="bash").replace("\\\n", " ").splitlines()
    assert len(commands) == 2
    for command in commands:
        program, *argv = shlex.split(command)
        assert program == "sharpen"
        assert main(argv) == 0
    assert "within the tolerance 0.0001" in capsys.readouterr().out
    assert (tmp_path / "parity.json").exists()


def test_the_example_of_the_endpoint_page(capsys):
    with serving() as (url, server):
        exec(code_block("endpoint.md"), {"URL": url, "MODEL": "instruct"})
    out = capsys.readouterr().out
    seed = server.asked[0]["seed"]
    # completions, their sums, and the likeliest of those that ended: the first
    assert out.startswith(f"['{seed} + 0', '{seed} + 1'")
    sums = [-1.5 - 0.25 * (i + 1) for i in range(8)]
    assert ast.literal_eval(out[out.index("] [") + 2 : out.rindex(" [")]) == sums
    assert out.rstrip().endswith("[0]")


def test_every_page_says_what_was_run():
    for name in ("verl", "axolotl", "ms-swift", "nemo-rl", "vllm", "endpoint", "parity"):
        text = (ROOT / "docs" / "hosts" / f"{name}.md").read_text()
        assert "run against" in text, name
