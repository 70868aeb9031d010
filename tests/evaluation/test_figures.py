import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from sharpen.evaluation import Outcome
from sharpen.evaluation.figures import End, accuracy_svg, apart, histogram_svg, logprob_svg


@pytest.fixture
def draw(summary_of):
    """Every figure an outcome has, by name."""

    def draw(outcome):
        summary = summary_of(outcome)
        figures = {
            "logprob": logprob_svg(summary),
            "histogram": histogram_svg(outcome, reward="logprob"),
        }
        if outcome.correct_PG is not None:
            figures["accuracy"] = accuracy_svg(summary, with_pass=False)
            figures["coverage"] = accuracy_svg(summary, with_pass=True)
        return figures

    return draw


def words(svg):
    return " ".join(element.text or "" for element in ET.fromstring(svg).iter() if element.text)


def test_figures_name_their_curves_in_text(make_outcome, draw):
    figures = draw(make_outcome())
    for name in ("greedy", "one sample", "mean_logprob", "majority"):
        assert name in words(figures["accuracy"])
    assert "pass@N" not in words(figures["accuracy"])
    assert "pass@N" in words(figures["coverage"])
    assert "correct:" in words(figures["histogram"])
    assert "incorrect:" in words(figures["histogram"])
    assert "nats" in words(figures["logprob"])


def test_same_input_same_bytes(make_outcome, draw):
    assert draw(make_outcome()) == draw(make_outcome())


def test_no_date_and_no_metadata(make_outcome, draw):
    for svg in draw(make_outcome()).values():
        assert svg.startswith("<svg")
        assert not re.search(r"metadata|rdf:|dc:date|DOCTYPE", svg)


def test_colours_follow_the_page_and_ids_are_the_figures_own(make_outcome, draw):
    for name, svg in draw(make_outcome()).items():
        bare = re.sub(r"var\([^)]*\)", "", svg)
        assert not re.search(r"#[0-9a-f]{6}\b", bare)
        ids = re.findall(r'\bid="([^"]*)"', svg)
        assert all(i.startswith(f"{name}-") for i in ids)
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
        assert {a or b for a, b in used} <= set(ids)


def test_drawing_leaves_matplotlib_as_it_was(make_outcome, draw):
    before = dict(mpl.rcParams)
    draw(make_outcome())
    assert dict(mpl.rcParams) == before


def run(reward, valid=True, correct=True):
    reward_PG = np.atleast_2d(np.asarray(reward, dtype=np.float64))
    shape = reward_PG.shape
    return Outcome({"logprob": reward_PG}, np.full(shape, valid), np.full(shape, correct))


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(run([-1.0]), id="one prompt, one sample"),
        pytest.param(run([[-1.0, -1.0]] * 3), id="all alike"),
        pytest.param(run([-1.0, -2.0], correct=False), id="all wrong"),
        pytest.param(run([-1.0, -np.inf]), id="minus infinity"),
        pytest.param(run([np.nan, np.nan], valid=False), id="nothing eligible"),
    ],
)
def test_poor_runs_are_drawn_too(outcome, draw):
    for svg in draw(outcome).values():
        assert ET.fromstring(svg).tag.endswith("svg")
        assert "nan" not in svg.lower().replace("nanc", "")


def test_improbable_responses_do_not_set_the_scale(draw):
    ordinary = np.linspace(-5, -1, 400).reshape(20, 20)
    ordinary[0, 0] = -1e6
    assert "000000" not in words(draw(run(ordinary))["histogram"])


def test_names_move_apart_as_little_as_needed():
    ends = [End(1.0, "a", ""), End(1.0, "b", ""), End(5.0, "c", "")]
    assert apart(ends, 1.0) == pytest.approx([0.5, 1.5, 5.0])
    assert apart(ends[:1], 1.0) == [1.0]
    assert np.diff(apart(ends, 3.0)).min() == pytest.approx(3.0)
