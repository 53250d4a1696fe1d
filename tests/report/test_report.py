"""The report is one page that needs nothing else, says what was measured, and never claims more."""

import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import pytest

from trace_jax.evaluation.fronts import Front as EvaluatedFront
from trace_jax.report import (
    Front,
    Number,
    Point,
    ReportData,
    Routing,
    SummaryRow,
    render_report,
    report_data,
    report_front,
    write_report,
)
from trace_jax.report.figures import mean_front, method_styles
from trace_jax.report.words import format_interval, format_number, plain_name, write_verdict

METHODS = ("uniform", "trace", "trace_rows")


def summary_row(method, value, *, kind="method", half_width=0.03, reached=True):
    utilities = {
        "neighbour_accuracy": Number(value, 600, value - half_width, value + half_width),
        "general_utility": Number(0.98, 96, 0.976, 0.984),
    }
    return SummaryRow(method, kind, Number(0.5, 240, 0.44, 0.56), utilities, reached=reached, step=28, seeds=2)


def front(seed, drop):
    points = [
        Point(s, 0.98 - 0.01 * s, {"neighbour_accuracy": 1 - drop * s, "general_utility": 0.99}) for s in (0, 20, 48)
    ]
    return Front(seed, points)


def certificate():
    experts = {"layer": [0, 1], "expert": [3, 2], "forget": [0.4, 0.3], "retain": [0.1, 0.2], "target": [0.4, 0.3]}
    return experts | {
        "weighted": [0.39, 0.3],
        "gap_before": 0.4,
        "gap_after": 0.01,
        "effective_sample_size": 0.093,
        "largest_weight": 50.0,
        "touched": 0.612,
        "infeasible": [[0, 1]],
        "strength": 0.61,
        "strength_asked": 0.75,
        "notes": ["strength lowered"],
    }


def full_data():
    frequency = np.random.default_rng(0).dirichlet(np.ones(8), size=3) * 2
    measured = {"name": "forget_accuracy", "value": 0.36, "n": 240, "low": 0.3, "high": 0.42, "split": "test"}
    return ReportData(
        title="Unlearning a topic",
        benchmark="handbook",
        forgotten="60 substances",
        level=0.5,
        chance=0.25,
        rows=[
            summary_row("target model", 1.0, kind="reference", half_width=0.0),
            summary_row("uniform", 0.73),
            summary_row("trace", 0.91),
            summary_row("trace_rows", 0.93),
            summary_row("permuted", 0.6, kind="control", reached=False),
        ],
        fronts={m: [front(s, 0.001 * (i + 1 + s)) for s in range(2)] for i, m in enumerate(METHODS)},
        bands={"trace": {"neighbour_accuracy": [{"forgetting": f, "low": 0.8, "high": 0.95} for f in (0.9, 0.5)]}},
        routing=Routing(frequency, frequency[::-1], 0.25, {"trace": frequency}, {"trace": frequency > 0.4}),
        certificates={"trace": certificate()},
        measurements={m: [measured, {**measured, "name": "auc", "low": math.nan, "high": None}] for m in METHODS},
        config={"data": {"benchmark": "handbook"}, "unlearning": {"optimizer": {"learning_rate": 1e-3}}},
        environment={"jax": "0.10.2"},
    )


class Outline(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects ids and the text outside of style."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.text, self.tags, self.attributes = [], [], [], [], set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def visible_text(page):
    return re.sub(r"\s+", " ", " ".join(Outline(page).text))


@pytest.fixture(scope="module")
def page():
    return render_report(full_data())


def test_the_page_stands_alone(page):
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b", page)
    assert not re.search(r"@import|url\((?!#)", page)
    references = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', page)
    assert references and all(r.startswith(("#", "data:")) for r in references)
    assert "default-src 'none'" in page


def test_the_page_is_well_formed_and_ids_are_unique(page):
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    wanted = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    assert wanted <= set(outline.ids)


def test_figures_are_inline_svg_in_the_colours_of_the_page(page):
    fronts, heat_maps, swatches = 2, 3, 3
    assert page.count("<svg") == fronts + heat_maps + swatches
    assert "var(--series-0)" in page and "var(--ink)" in page
    assert not re.search(r"#0a0[bc]", page)  # every stand-in colour has become a variable
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_every_method_and_number_is_there(page):
    text = visible_text(page)
    for method in (*METHODS, "permuted", "target model"):
        assert method in text
    for shown in ("0.930", "[0.900, 0.960]", "n = 600", "0.400 → 0.010", "9.3 %", "50.00", "0.610 (0.750)", "0.3"):
        assert shown in text
    assert "did not reach the level" in text
    assert "unlearning.optimizer.learning_rate 0.001" in text


def test_everything_that_comes_from_outside_is_escaped():
    evil = '<img src=x onerror="alert(1)">'
    data = dataclasses.replace(
        full_data(),
        title=evil,
        forgotten=evil,
        forgetting=evil,
        rows=[summary_row(evil, 0.9), SummaryRow("b", note=evil, utilities={evil: Number(0.5)})],
        fronts={evil: [Front(0, [Point(0, 0.9, {evil: 1.0, "$x^{2": 1.0})])]},
        certificates={evil: certificate() | {"notes": [evil]}},
        measurements={evil: [{"name": evil, "value": 1.0, "note": evil}]},
        config={evil: evil},
        environment={evil: evil},
    )
    outline = Outline(render_report(data))
    assert "img" not in outline.tags and "onerror" not in outline.attributes
    assert outline.text.count(evil) >= 8


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(ReportData) if f.name != "title"])
def test_any_part_may_be_missing(part):
    plain = {f.name: getattr(full_data(), f.name) for f in dataclasses.fields(ReportData)}
    del plain[part]
    assert "Unlearning a topic" in visible_text(render_report(ReportData(**plain)))


def test_a_title_alone_is_a_page():
    text = visible_text(render_report(ReportData(title="Nothing yet")))
    assert "No method has been evaluated yet" in text
    assert "Where the text is routed" not in text


def test_missing_numbers_are_dashes_and_break_no_figure():
    data = dataclasses.replace(
        full_data(),
        rows=[SummaryRow("uniform", forgetting=Number(math.nan), utilities={"general_utility": Number(None)})],
        fronts={"uniform": [Front(0, [Point(0, math.nan, {"general_utility": 1.0}), Point(4, 0.5, {})])]},
        routing=Routing([[math.nan, 0.0]], [[0.0, 0.0]], 0.5),
        certificates={"trace": {}},
        measurements={"uniform": [{"name": "auc", "value": math.nan}]},
    )
    text = visible_text(render_report(data))
    assert "nan" not in text.lower()
    assert "–" in text


def test_a_study_on_a_large_model_stays_under_two_megabytes():
    rng = np.random.default_rng(1)
    frequency = rng.dirichlet(np.ones(128) / 2, size=48) * 8
    names = [f"method_{i}" for i in range(12)]
    experts = {k: rng.random(2000).tolist() for k in ("layer", "expert", "forget", "retain", "weighted")}
    measured = [{"name": f"m{i}", "value": 0.5, "n": 10, "low": 0.4, "high": 0.6} for i in range(5000)]
    data = dataclasses.replace(
        full_data(),
        rows=[summary_row(name, 0.9) for name in names],
        fronts={name: [front(seed, 0.001) for seed in range(5)] for name in names},
        routing=Routing(
            frequency, frequency, 8 / 128, {n: frequency for n in names[:4]}, {n: frequency > 0.1 for n in names[:4]}
        ),
        certificates={name: experts for name in names},
        measurements={name: measured for name in names},
    )
    page = render_report(data)
    assert len(page.encode()) < 2_000_000
    assert "more are in the run directory" in page


def test_the_same_data_give_the_same_page(page):
    assert render_report(full_data()) == page


def test_plain_mappings_serve_as_well_as_dataclasses(page, tmp_path):
    plain = json.loads(json.dumps(dataclasses.asdict(full_data()), default=lambda array: array.tolist()))
    written = write_report(plain, tmp_path / "run" / "report.html")
    assert written.read_text(encoding="utf-8") == page
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.html"]


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"ReportData has no frontz"):
        report_data({"title": "x", "frontz": {}})
    with pytest.raises(ValueError, match=r"SummaryRow has no utilitys"):
        report_data({"title": "x", "rows": [{"method": "trace", "utilitys": {}}]})
    with pytest.raises(ValueError, match=r"kind of 'trace' is 'winner'"):
        SummaryRow("trace", kind="winner")


def test_the_verdict_states_prices_and_whether_intervals_overlap():
    verdict = write_verdict(full_data())
    assert "60 substances" in verdict.opening and "down to 0.5" in verdict.opening and "chance: 0.25" in verdict.opening
    by_method = {price.method: price.text for price in verdict.prices}
    assert list(by_method) == list(METHODS)  # references and controls are no methods
    assert by_method["uniform"] == "keeps neighbour accuracy 0.730 and general utility 0.980."
    assert "neighbour accuracy 0.930 (uniform: 0.730, intervals apart)" in by_method["trace_rows"]
    assert "general utility 0.980 (uniform: 0.980, intervals overlap)" in by_method["trace_rows"]


def test_the_verdict_says_when_a_method_did_not_forget():
    data = ReportData(title="x", level=0.5, rows=[summary_row("trace", 0.9, reached=False)])
    assert "did not get there (lowest forget accuracy: 0.500)" in write_verdict(data).prices[0].text


def test_evaluated_fronts_become_what_the_report_draws():
    evaluated = EvaluatedFront(np.array([0, 4]), np.array([0.9, 0.5]), {"u": np.array([1.0, 0.8])}, {})
    assert report_front(3, evaluated) == Front(3, [Point(0, 0.9, {"u": 1.0}), Point(4, 0.5, {"u": 0.8})])


def test_the_mean_front_uses_the_steps_that_every_run_has():
    short = Front(1, [Point(0, 0.96, {"u": 0.5}), Point(20, 0.7, {"u": 0.3})])
    long = Front(0, [Point(0, 1.0, {"u": 1.0}), Point(20, 0.9, {"u": 0.9}), Point(40, 0.5, {"u": 0.8})])
    mean = mean_front([long, short])
    assert [p.step for p in mean.points] == [0, 20]
    assert mean.points[0].forgetting == pytest.approx(0.98)
    assert mean.points[1].utilities["u"] == pytest.approx(0.6)


def test_two_methods_never_look_the_same():
    styles = method_styles(["uniform", *(f"method_{i}" for i in range(20))], "uniform")
    looks = {(s.colour, s.marker, s.dash) for s in styles.values()}
    assert len(looks) == 21
    others = {s.colour for method, s in styles.items() if method != "uniform"}
    assert styles["uniform"].colour not in others


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.000"),
        (0.12345, "0.123"),
        (12.345, "12.35"),
        (1234567, "1,234,567"),
        (2500.5, "2,500"),
        (3.1e-11, "3.1e-11"),
        (math.nan, "–"),
        (math.inf, "–"),
        (None, "–"),
        (True, "yes"),
        (np.float64(0.5), "0.500"),
        (np.int64(1200), "1,200"),
    ],
)
def test_numbers_read_well(value, text):
    assert format_number(value) == text


def test_names_are_words():
    assert plain_name("neighbour_accuracy") == "neighbour accuracy"
    assert plain_name("forget_nll") == "forget NLL"


def test_an_interval_needs_both_ends():
    assert format_interval(0.1, 0.2) == "[0.100, 0.200]"
    assert format_interval(0.1, math.nan) == "" and format_interval(None, 0.2) == ""
