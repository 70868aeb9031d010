import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.evaluation import Texts
from sharpen.evaluation.report import MAX_PROMPTS, render_report

EVIL = "<script>alert('x')</script>\"'&amp;<img src=http://evil.test/x>"
VOID = {"meta", "img", "br", "hr", "link", "input"}
FETCHES = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base", "form"}


class Page(HTMLParser):
    """Tags, attributes, text, and whether every tag is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.text, self.open = set(), [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [
            value for name, value in attrs if name.split(":")[-1] in ("src", "href", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def render(make_outcome, summary_of, texts_of):
    def render(outcome=None, texts=None, **settings):
        outcome = make_outcome() if outcome is None else outcome
        return render_report(summary_of(outcome, **settings), outcome, texts or texts_of(outcome))

    return render


def test_nothing_from_outside_becomes_markup(make_outcome, render):
    outcome = make_outcome(P=7, G=6)
    texts = Texts(
        [f"{EVIL} prompt"] * 7, [[f"{EVIL} response {g}" for g in range(6)] for _ in range(7)]
    )
    html = render(outcome, texts, task=EVIL, model=EVIL, **{EVIL: {EVIL: EVIL}})
    page = Page(html)
    assert not page.tags & FETCHES
    assert page.open == []
    shown = "".join(page.text)
    for what in (f"{EVIL} prompt", f"{EVIL} response", f"{EVIL}, model {EVIL}"):
        assert what in shown


def test_page_fetches_nothing(render):
    html = render()
    page = Page(html)
    assert not page.tags & FETCHES
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'" in html


def test_ids_are_unique(render):
    ids = re.findall(r'\bid="([^"]*)"', render())
    assert ids
    assert len(ids) == len(set(ids))


def test_same_run_same_bytes(render):
    assert render() == render()


def test_headline_says_the_numbers_of_the_summary(make_outcome, summary_of, render):
    outcome = make_outcome(P=40, G=10)
    accuracy = summary_of(outcome)["accuracy"]
    shown = "".join(Page(render(outcome)).text).replace("\N{NO-BREAK SPACE}", " ")
    assert (
        f"Best of 10 by logprob solves {100 * accuracy['best_of_n']['logprob']['10']:.1f} %"
        in shown
    )
    assert f"greedy decoding {100 * accuracy['greedy']:.1f} %" in shown
    assert f"{100 * accuracy['pass_at_n']['10']:.1f} %" in shown


def test_without_a_checker_no_accuracy_is_claimed(make_outcome, render):
    page = Page(render(make_outcome(checker=False), task=None))
    shown = "".join(page.text)
    assert page.open == []
    assert "Accuracy" not in shown
    assert "correct" not in shown
    assert "chooses responses of" in shown


def test_without_greedy_the_page_still_stands(make_outcome, summary_of, texts_of, render):
    outcome = make_outcome()
    object.__setattr__(outcome, "greedy_correct_P", None)
    page = Page(render(outcome))
    assert page.open == []
    assert "greedy decoding" not in "".join(page.text)


def test_many_prompts_are_cut_and_the_page_says_so(make_outcome, render):
    html = render(make_outcome(P=MAX_PROMPTS + 30, G=2))
    assert f"{MAX_PROMPTS} of {MAX_PROMPTS + 30} prompts" in html
    assert html.count("<div class='grade'>prompt ") == MAX_PROMPTS


def test_long_response_keeps_its_beginning_and_its_end(make_outcome, texts_of, render):
    outcome = make_outcome(P=2, G=2)
    long = "BEGIN" + "x" * 100_000 + "END"
    html = render(outcome, Texts([long, "p"], texts_of(outcome).completions))
    assert "BEGIN" in html
    assert "END</pre>" in html
    assert "characters left out" in html
    assert "x" * 2000 not in html


def test_texts_of_another_run_are_refused(make_outcome, render):
    with pytest.raises(InputError, match="`completions` must hold P=7 lists, got 1"):
        render(make_outcome(), Texts(["p"], [["r"]]))


def test_any_character_can_be_quoted(make_outcome, render):
    outcome = make_outcome(P=1, G=2)
    object.__setattr__(outcome, "valid_PG", np.ones((1, 2), dtype=bool))
    texts = Texts(["\x00 \ud800 \x1b[31m"], [["é 漢 \N{GRINNING FACE}", "b"]])
    html = render(outcome, texts)
    html.encode("utf-8")
    assert html.startswith("<!doctype html>")
    assert html.endswith("</html>\n")
    assert "\x00" not in html
    assert "\x1b" not in html
