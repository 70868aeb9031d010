""""""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sharpen.experiments.theory.error_shape import error_bound, spread_prompts
from sharpen.experiments.theory.lower_bound import HardFamily
from sharpen.experiments.theory.run import STUDIES
from sharpen.experiments.theory.study import Line, Panel, Study, chart_svg, markdown

DOCS = Path(__file__).parents[3] / "docs" / "algorithms"
# the third takes a quarter of a minute; the command's test runs it
FAST = ["lower-bound", "error-shape"]


def rows_of(name, seed=0):
    study = STUDIES[name](quick=True)
    return study, [study.row(i, seed) for i in range(len(study.cases))]


@pytest.fixture(scope="module", params=FAST)
def ran(request):
    return request.param, *rows_of(request.param)


def test_a_row_depends_on_its_case_and_the_seed_alone(ran):
    name, study, rows = ran
    assert study.row(len(rows) - 1, 0) == rows[-1]
    assert rows_of(name)[1] == rows
    assert study.row(0, 1) != rows[0]
    assert all(case.items() <= row.items() for case, row in zip(study.cases, rows, strict=True))
    json.dumps(rows, allow_nan=False)


def test_the_figure_shows_every_line_and_is_the_same_bytes_again(ran):
    name, study, rows = ran
    panels = study.panels(rows)
    svg = chart_svg(panels, name)
    assert svg == chart_svg(panels, name)
    for panel in panels:
        assert panel.ylabel in svg
        assert all(line.name in svg for line in panel.lines)
    assert "<script" not in svg


@pytest.mark.parametrize("linear_x", [True, False])
def test_numbers_on_logarithmic_axes_are_plain(linear_x):
    line = Line("one", [1, 1234], [1.0, 100_000.0])
    svg = chart_svg([Panel("width", "height", [line], linear_x=linear_x)], "plain")
    assert ">100,000<" in svg
    assert (">1,234<" in svg) == (not linear_x)
    # no powers of ten
    assert "mathdefault" not in svg


def test_a_row_of_the_lower_bound_is_of_its_family():
    _, rows = rows_of("lower-bound")
    for row in rows:
        family = HardFamily(row["d"], row["eps"], row["c"])
        assert row["fixed"] == family.cost(family.eps)
        assert row["adaptive"] == family.cost(family.eps, adaptive=True)
        assert row["bound"] == family.bound()
        assert row["error"] == pytest.approx(row["eps"], abs=4 * row["error_se"])
        assert row["error_with_guesses"] <= row["error"]


def test_the_lower_bound_s_table_says_what_the_rows_hold():
    study, rows = rows_of("lower-bound")
    text = study.table(rows)
    assert text.count("\n| 1 | ") == 3
    assert text.count("\n| 4 | ") == 3
    exponents = [float(x) for x in re.findall(r"\(1/eps\)\^(\d\.\d\d)", text)]
    assert exponents == pytest.approx([2, 1, 2, 1], abs=0.05)


def test_the_error_shape_s_table_says_what_the_rows_hold():
    study, rows = rows_of("error-shape")
    text = study.table(rows)
    loosest = min(row["bound"] / row["error"] for row in rows if row["least"] == 0)
    assert f"at least {loosest:.3g} times the error" in text
    for row in rows:
        line = next(x for x in text.splitlines() if x.startswith(f"| {row['n']:,} |"))
        assert row["least"] > 0 or f"{row['error']:.3g}" in line
        prompts = spread_prompts(12, 64, row["least"])
        assert row["coverage"] == pytest.approx(prompts.coverage)
        assert row["bound"] == pytest.approx(error_bound(prompts, row["n"], row["N"], 0.1))
    # only where both tails are long
    assert text.count("Fitted") == 1


def test_a_table_is_markdown():
    text = markdown(["a", "b", "c"], [[1234, 0.12345, None], ["x", 1234.5, 2.0]])
    head, rule, *lines = text.splitlines()
    assert (head, rule) == ("| a | b | c |", "| --- | --- | --- |")
    assert lines == ["| 1,234 | 0.123 | never |", "| x | 1,234 | 2 |"]


def test_a_figure_of_one_panel_and_a_linear_axis():
    line = Line("samples", [4, 6, 8], [1.0, 10.0, 100.0])
    svg = chart_svg([Panel("d", "m", [line, Line("", [4, 8], [2.0, 3.0], dashed=True)], True)], "x")
    assert svg.lstrip().startswith("<?xml")
    assert svg.count(">samples<") == 1


def test_cases_are_drawn_apart():
    study = Study(
        cases=[{"a": 1}, {"a": 1}],
        measure=lambda case, rng: {"draw": float(rng.random())},
        table=lambda rows: "",
        panels=lambda rows: [],
    )
    assert study.row(0, 0)["draw"] != study.row(1, 0)["draw"]
    assert study.row(0, 0) == {"a": 1, "draw": np.random.default_rng([0, 0]).random()}


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_shows_the_table_of_the_rows_that_lie_beside_it(name):
    folder, study = DOCS / "theory" / name, STUDIES[name]()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert all(case.items() <= row.items() for case, row in zip(study.cases, rows, strict=True))
    text = study.table(rows)
    assert (folder / "table.md").read_text() == text
    page = (DOCS / "theory.md").read_text()
    assert text in page
    assert f"theory/{name}/figure.svg" in page
    svg = (folder / "figure.svg").read_text()
    assert all(panel.ylabel in svg for panel in study.panels(rows))


@pytest.mark.parametrize("name", FAST)
def test_a_row_that_lies_beside_the_page_is_measured_again(name):
    (line, *_) = (DOCS / "theory" / name / "rows.jsonl").read_text().splitlines()
    for key, value in STUDIES[name]().row(0, 0).items():
        assert value == pytest.approx(json.loads(line)[key]), key
