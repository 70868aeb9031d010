"""Pages about the server do what they say: their commands start it, their examples ask it."""

import doctest
import json
import shlex

import pytest

from helpers.documented import blocks, ran
from helpers.serving import serving
from test_layers import ROOT

PAGES = ("server", "openrlhf", "llama-factory")
PORT = "8000"


def commands(page):
    """Every command of a page's bash blocks, without those that install."""
    text = "\n".join(blocks(f"docs/hosts/{page}.md", "bash")).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if not line.startswith("pip install ")]


def started(page):
    """The server, as the one command of the page that starts it says, on a free port."""
    (line,) = [line for line in commands(page) if line.startswith("sharpen serve ")]
    words = shlex.split(line, comments=True)[2:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.pop("--port") == PORT
    model = options.pop("--model")
    return serving(model, *(word for pair in options.items() for word in pair))


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_under_the_server_that_it_starts(page):
    with started(page) as server:
        text = (ROOT / "docs" / "hosts" / f"{page}.md").read_text()
        text = text.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{server.port}")
        test = doctest.DocTestParser().get_doctest(text, {}, page, f"{page}.md", 0)
        told = []
        result = doctest.DocTestRunner().run(test, out=told.append)
    assert result.attempted >= 3
    assert result.failed == 0, "".join(told)


def test_the_harness_through_the_server_as_the_page_says(tmp_path):
    shell = blocks("docs/hosts/lm-eval.md", "bash")[0]
    made = ran(shell[: shell.index("sharpen lm-eval")], "bash", tmp_path)
    assert made.returncode == 0, made.stderr
    rest = [line for line in commands("server") if not line.startswith("sharpen serve ")]
    with started("server") as server:
        script = "\n".join(rest).replace(f":{PORT}/", f":{server.port}/")
        assert str(server.port) in script
        done = ran(script, "bash", tmp_path)
        asked = server.metrics()
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/*/results_*.json")
    assert json.loads(path.read_text())["results"]["steps"]["acc,none"] == 1.0
    # two questions with three choices each
    assert asked['sharpen_requests_total{route="/v1/completions",status="200"}'] == 6


@pytest.mark.parametrize("page", PAGES[1:])
def test_no_command_of_a_page_is_left_out(page):
    assert [line.split()[:2] for line in commands(page)] == [["sharpen", "serve"]]
