"""What `sharpen serve` refuses before it loads a model."""

import sys

import pytest

from sharpen.cli import main

SERVE = ["serve", "--model", "game24", "--device", "cpu", "--port", "0"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reward", "best"], "`reward` must be one of logprob"),
        (["--reward", "majority"], "`reward` majority needs answers, which only `/score` can get"),
        (["--wait-ms", "-1"], "`wait_ms` must be at least 0 and finite, got -1.0"),
        (["--drain-seconds", "inf"], "`drain_seconds` must be at least 0 and finite"),
        (["--unscorable-reward", "nan"], "`unscorable_reward` must be a finite number, got nan"),
        (["--max-tokens", "0"], "`max_tokens` must be at least 1, got 0"),
        (["--max-queue", "0"], "`max_queue` must be at least 1, got 0"),
        (["--host", "0.0.0.0"], "set the environment variable SHARPEN_API_KEY, or use 127.0.0.1"),
    ],
)
def test_options_that_no_server_can_have(flags, told, monkeypatch, capsys):
    monkeypatch.delenv("SHARPEN_API_KEY", raising=False)
    assert main([*SERVE, *flags]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(SERVE) == 2
    error = capsys.readouterr().err
    assert "`sharpen serve` needs fastapi" in error
    assert 'pip install "sharpen[serve]"' in error
