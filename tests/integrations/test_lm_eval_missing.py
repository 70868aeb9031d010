"""A host that is not installed is told by name, with the command that installs it."""

import sys

from sharpen.cli import main


def test_lm_eval_is_told_to_be_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    before = list(sys.argv)
    assert main(["lm-eval", "--tasks", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sharpen: lm-evaluation-harness must be installed, got ")
    assert err.endswith('; run `pip install "sharpen[lm-eval]"`.\n')
    assert sys.argv == before


def test_the_help_of_lm_eval_comes_without_it_too(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--help"]) == 2
    out, err = capsys.readouterr()
    assert "`--model sharpen`" in out
    assert "pip install" in err
