"""The report is one page that needs nothing else, says what was measured, and never claims more."""

import html.parser
import json
import math
import re

import numpy as np
import pytest

from trace_jax.io.progress import format_interval, format_number, plain_name
from trace_jax.report.figures import mean_front, method_styles
from trace_jax.report.page import figure_files, recovered, render

METHODS = ("uniform", "trace", "trace_rows")
BENCHMARK = {"benchmark": "handbook", "forgetting": "forget_accuracy", "chance": 0.25}
NEEDED = ("title", "config", *BENCHMARK)
CONFIG = {"data": {"benchmark": "handbook"}, "evaluation": {"levels": [0.5]}, "unlearning": {"learning_rate": 1e-3}}


def number(value, n=240, half_width=0.03):
    return {"value": value, "n": n, "low": value - half_width, "high": value + half_width}


def measured(value, name="forget_accuracy", **rest):
    return {"name": name, "split": "test", **number(value, 40, 0.1), **rest}


def row(method, value, *, kind="method", reached=True, half_width=0.03):
    utilities = {"neighbour_accuracy": number(value, 600, half_width), "general_utility": number(0.98, 96, 0.004)}
    return {
        "method": method, "kind": kind, "forgetting": number(0.5), "utilities": utilities, "reached": reached,
        "step": 28.4, "seeds": 2, "note": "", "between": [], "gain": None,
    }  # fmt: skip


def front(drop):
    steps = [0, 20, 48]
    utilities = {"neighbour_accuracy": [1 - drop * s for s in steps], "general_utility": [0.99] * 3}
    return {"steps": steps, "forgetting": [0.98 - 0.01 * s for s in steps], "utilities": utilities}


def certificate():
    experts = {"layer": [0, 1], "expert": [3, 2], "forget": [0.4, 0.3], "retain": [0.1, 0.2], "target": [0.4, 0.3]}
    totals = ["gap_elsewhere_before", "gap_elsewhere_after", "clipped", "rho", "iterations", "gradient_norm"]
    return experts | dict.fromkeys(totals, 0) | {
        "weighted": [0.39, 0.3], "gap_before": 0.4, "gap_after": 0.01, "effective_sample_size": 0.093,
        "largest_weight": 50.0, "touched": 0.612, "infeasible": [[0, 1]], "tokens": 1000,
        "notes": ["the target is missed"],
    }  # fmt: skip


def attack(*points, strongest=0, failed=""):
    points = [{"at": at, "measurements": [measured(value)]} | rest for at, value, rest in points]
    return {"points": points, "strongest": strongest, "failed": failed}


ATTACKS = {
    "quantization": attack(("8 bits", 0.4, {}), ("4 bits", 0.65, {}), strongest=1),
    "prompting": attack(("3 examples", 0.5, {"original": [measured(0.6)]})),
    "benign_relearning": attack(("9 steps", 0.3, {"retrained": [measured(0.35)]})),
    "relearning": attack(strongest=None, failed="the model gives NaN"),
}


def method(index, **rest):
    return {
        "fronts": {"test": front(0.001 * (index + 1))}, "routing": {}, "attacks": {},
        "measurements": [measured(0.4), measured(0.5, "auc", low=None, high=None, note="too few items")],
        "trained": [{"trained": 100, "parameters": 4000}, {"trained": 0, "parameters": 50}],
    } | rest  # fmt: skip


def frequencies(frequency, **rest):
    values = {"forget": frequency, "retain": frequency[::-1], "uniform": 0.25, "layers": ()}
    return values | {"calibrated": {"trace": frequency}, "selected": {"trace": np.array(frequency) > 0.4}} | rest


def results(**changes):
    """What a finished run of the handbook hands to the report."""
    return {
        **BENCHMARK, "title": "Unlearning a topic", "forgotten": "60 substances",
        "rows": [
            row("target model", 1.0, kind="reference", half_width=0.0), row("uniform", 0.73), row("trace", 0.91),
            row("trace_rows", 0.93), row("permuted", 0.6, kind="control", reached=False),
        ],
        "references": {"target": [measured(0.9), measured(0.8, split="validation")]},
        "methods": {name: method(i) for i, name in enumerate(METHODS)},
        "frequency": frequencies(np.random.default_rng(0).dirichlet(np.ones(8), size=3) * 2),
        "certificates": {"trace": certificate()}, "config": CONFIG, "environment": {"jax": "0.10.2"},
    } | changes  # fmt: skip


class Outline(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects ids and the text outside of style."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.text, self.tags, self.attributes = [], [], [], [], set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open += [tag] * (tag not in self.VOID)

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
    return render(results())


def check_alone(page):
    """The page needs nothing else, and can be read aloud."""
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\((?!#)", page)
    references = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', page)
    assert references and all(r.startswith(("#", "data:")) for r in references)
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids)) and {r[1:] for r in references if r[0] == "#"} <= set(outline.ids)
    assert set(re.findall(r"url\(#([^)]+)", page)) <= set(outline.ids)
    assert [tag for tag in outline.tags if tag in ("h1", "main")] == ["h1", "main"]
    figures = re.findall(r"<svg [^>]*>", page)
    assert all('role="img" aria-label="' in figure or 'aria-hidden="true"' in figure for figure in figures)


def test_the_page_stands_alone_and_figures_are_inline_svg_in_its_colours(page):
    check_alone(page)
    assert render(json.loads(json.dumps(results(), default=lambda array: array.tolist()))) == page  # from a file too
    fronts, heat_maps, swatches = 2, 3, 3
    assert page.count("<svg") == fronts + heat_maps + swatches
    assert not re.search(r"#0a0[bc]", page)  # every stand-in colour has become a variable
    for used in ("var(--series-0)", "var(--ink)", "prefers-color-scheme: dark", "@media print"):
        assert used in page


def test_every_method_and_number_is_there(page):
    """The conclusion comes first; what was not measured is marked, and one seed is called one seed."""
    text = visible_text(page)
    for shown in (
        *METHODS, "permuted", "target model", "0.930", "[0.900, 0.960]", "n = 600", "0.400 → 0.010", "9.3 %", "50.00",
        "97.5 %", "(0, 1)", "did not reach the level", "100 of 4,050 parameters", "unlearning.learning_rate 0.001",
        "Methods are compared where forget accuracy has come down to 0.5, from",
        "(chance: 0.25).", "step 28.4",
    ):  # fmt: skip
        assert shown in text
    assert "No ranking" not in text and "≈ 0" not in text and "intervals apart" not in text
    around = [{"step": 10, "forgetting": 0.742}, {"step": 15, "forgetting": 0.383}]
    single = row("trace", 0.9) | {"between": around, "gain": number(0.12, 600, 0.02)}
    config = CONFIG | {"seed": 7, "model": {"ropes": [{"theta": 1e4}], "windows": []}}
    text = visible_text(render(results(rows=[single], conclusion="trace is best.", config=config)))
    for shown in (
        "trace is best.", "No ranking. One seed (7), settings not tuned.", "≈ 0.900", "+12.0 % [+10.0 %, +14.0 %]",
        "trace: steps 10 and 15, forget accuracy 0.742 and 0.383).", "model.ropes.0.theta 10000.0 model.windows none",
    ):  # fmt: skip
        assert shown in text
    assert "No method has been evaluated yet" in visible_text(render(results(rows=[])))


def test_everything_that_comes_from_outside_is_escaped():
    evil = '<img src=x onerror="alert(1)">'
    fronts = {"test": front(0.1) | {"utilities": {evil: [1.0, 1.0, 1.0], "$x^{2": [1.0, 1.0, 1.0]}}}
    page = results(
        rows=[row(evil, 0.9) | {"note": evil, "utilities": {evil: number(0.5)}}],
        methods={evil: method(0, fronts=fronts, measurements=[measured(1.0, evil, note=evil)])},
        certificates={evil: certificate() | {"notes": [evil]}},
        config=CONFIG | {evil: evil},
        **dict.fromkeys(("title", "forgotten"), evil),
        environment={evil: evil},
    )
    outline = Outline(render(page))
    assert "img" not in outline.tags and "onerror" not in outline.attributes
    assert outline.text.count(evil) >= 8


@pytest.mark.parametrize("parts", [["rows"], ["methods"], ["frequency"], [k for k in results() if k not in NEEDED]])
def test_parts_may_be_missing(parts):
    plain = {name: value for name, value in results().items() if name not in parts}
    assert "Unlearning a topic" in visible_text(render(plain))


def test_missing_numbers_are_dashes_and_break_no_figure():
    missing = number(0.5) | dict.fromkeys(("value", "low", "high"))
    data = results(
        rows=[row("uniform", 0.5) | {"forgetting": missing, "utilities": {"general_utility": missing}}],
        methods={"uniform": method(0, measurements=[measured(0.5) | {"value": None}])},
        frequency=frequencies(np.array([[math.nan, 0.0]]), uniform=0.5),
    )
    text = visible_text(render(data))
    assert "nan" not in text.lower() and "none" not in text.lower() and "–" in text


def test_a_study_shows_all_seeds_of_the_chosen_setting_and_a_series_every_step():
    run = {"variant": "npo", "method": "trace"}
    runs = [run | {"setting": s, "test": front(d)} for s in ("alpha=1", "alpha=4") for d in (0.001, 0.002, 0.003)]
    chosen = row("npo: trace", 0.9) | {"run": ("npo", "trace", "alpha=4")}
    study = {**BENCHMARK, "title": "Study", "rows": [chosen], "runs": runs, "config": CONFIG}
    page, thin = render(study), 3 * 2  # runs and utilities
    assert page.count("stroke-opacity: 0.4") == thin and "lines are means over runs, thin ones single runs" in page
    steps = [{"step": n, "methods": {"trace": {"measurements": [measured(0.1 * n)]}}} for n in (1, 2)]
    series = {**BENCHMARK, "title": "Series", "verdict": "2 steps.", "config": CONFIG, "steps": steps}
    text = visible_text(render(series | {"scores": {"knowmem": {"trace": [0.9, None, 0.2]}}}))
    assert all(words in text for words in ("2 steps.", "Step by step", "knowmem", "Step 2, test split"))


def test_the_table_and_the_figure_of_attacks_hold_every_attack():
    methods = {"uniform": method(0, attacks=ATTACKS), "trace": method(1)}
    text = visible_text(render(results(methods=methods)))
    for line in (
        "before unlearning 0.900 [0.800, 1.000] after unlearning 0.400",
        "quantization 0.650 [0.550, 0.750] 4 bits, 50 % back",
        "prompting 0.500 [0.400, 0.600] 3 examples, original: 0.600",
        "benign relearning 0.300 [0.200, 0.400] 9 steps, -20 % back, retrained: 0.350",
        "relearning – the model gives NaN",
        "4 forms", "quantization 8 bits 0.400 [0.300, 0.500] 0 % back", "n = 40", "dotted: chance", "hollow: a model",
    ):  # fmt: skip
        assert line in text
    plain = render(results())
    assert "Under attack" not in plain and "Which experts carry the damage" not in plain
    assert recovered(0.65, 0.4, 0.4) is None and recovered(None, 0.4, 0.9) is None


def test_what_returns_with_original_experts_is_drawn_and_said():
    names = [(kind, kind, 0) for kind in ("original", "unlearned", "all", "part")]
    names += [(kind, f"{size} {kind}", size) for size in (1, 2) for kind in ("critical", "random", "least")]
    models = [
        {"kind": k, "name": n, "size": s, "values": {"forget_accuracy": number(0.3 + 0.01 * i, 120)}}
        for i, (k, n, s) in enumerate(names)
    ]
    models[4]["over_random"] = models[7]["over_random"] = {"forget_accuracy": number(0.083)}
    put = {"drift": [[0.1, 0.2, 0.0, 0.3]], "ratio": [[1.0, 4.0, 0.0, None]], "models": models, "note": ""}
    put["correlation"] = {"ratio": number(0.82, 32)}
    nothing = {**put, "models": [], "note": "Nothing was put back: unlearning changed no parameter."}
    page = render(results(methods={"uniform": method(0, patching=put), "trace": method(1, patching=nothing)}))
    text = visible_text(page)
    assert "over the 32 experts that moved: 0.820 [0.790, 0.850]" in text
    assert "critical beyond random ones, paired: 1 of each layer 0.083 [0.053, 0.113] , 2 of each layer" in text
    assert nothing["note"] in text and "Part by part" in text
    assert page.count("with original experts put back") == 1 and page.count("drift of each expert, ") == 2


def test_what_models_say_and_how_they_were_trained_is_shown():
    question = {"prompt": "Which salt?", "options": ["blue", "red"], "truth": "red", "answers": {"trace": [0.75, 0.25]}}
    text = {"prompt": "It", "options": (), "truth": "is <so>", "answers": {"target model": "is so", "trace": "was"}}
    curve = {"step": [1, 2], "loss": [2.0, 1.0], "forget_loss": [None, None]}
    environment = {"devices": ["tpu:v5e"] * 8, "cores": 4, "command": "trace-jax run --config quickstart"}
    about = {"losses": {"trace": curve}, "environment": environment, "changed": {"unlearning"}}
    page = render(results(examples=[question, text], config=CONFIG | {"seed": 3}, **about))
    shown = visible_text(page)
    for words in (
        "Which salt?", "red right 0.25", "truth is <so> target model is so trace was", "Losses while unlearning",
        "seed 3",
        "8 × v5e; 4 CPU cores", "trace-jax run --config quickstart",
        "4,050 parameters, 3 MoE layers of 8 experts, top 2",
        "Settings that differ from the defaults unlearning.learning_rate 0.001 Whole configuration 4 settings",
    ):  # fmt: skip
        assert words in shown
    assert "Loss at each step" in page and "Forget loss at each step" not in page


def test_figures_for_papers_are_in_the_colours_of_a_light_page():
    files = figure_files(results())
    assert set(files) == {f"front-{n}.{s}" for n in ("neighbour_accuracy", "general_utility") for s in ("svg", "pdf")}
    svg, pdf = (files[f"front-general_utility.{suffix}"] for suffix in ("svg", "pdf"))
    assert b"#0072b2" in svg and b"trace_rows" in svg and not re.search(rb"#0a0[bc]", svg)
    assert b" ".join(b"%.10f" % (int(c, 16) / 255) for c in ("00", "72", "b2")) in b" ".join(pdf.split())
    start = int(re.search(rb"startxref\n(\d+)", pdf)[1])
    assert pdf[start:].startswith(b"xref") and b"0.0392156863" not in pdf  # no stand-in is left, no place moved


def test_a_large_study_stays_under_two_megabytes():
    rng = np.random.default_rng(1)
    frequency, names = rng.dirichlet(np.ones(128) / 2, size=48) * 8, [f"method_{i}" for i in range(12)]
    experts = {k: rng.random(2000).tolist() for k in ("layer", "expert", "forget", "retain", "target", "weighted")}
    many, selected = dict.fromkeys(names[:4], frequency), dict.fromkeys(names[:4], frequency > 0.1)
    many_numbers = [measured(0.5, f"name_{i}") for i in range(5000)]
    large = results(
        rows=[row(name, 0.9) for name in names],
        methods={n: method(i, measurements=many_numbers) for i, n in enumerate(names)},
        frequency=frequencies(frequency, uniform=1 / 16, calibrated=many, selected=selected),
        certificates=dict.fromkeys(names, certificate() | experts),
    )
    page = render(large)
    assert len(page.encode()) < 2_000_000 and "more are in the run directory" in page


def test_the_mean_front_uses_the_steps_that_every_run_has():
    short = {"steps": [0, 20], "forgetting": [0.96, 0.7], "utilities": {"u": [0.5, 0.3]}}
    long = {"steps": [0, 20, 40], "forgetting": [1.0, 0.9, 0.5], "utilities": {"u": [1.0, 0.9, 0.8]}}
    mean = mean_front([long, short])
    assert mean["steps"] == [0, 20]
    np.testing.assert_allclose(mean["forgetting"], [0.98, 0.8])
    np.testing.assert_allclose(mean["utilities"]["u"], [0.75, 0.6])


def test_two_methods_never_look_the_same_and_one_looks_the_same_on_every_page():
    known = ("uniform", "trace", "trace_rows")
    styles = method_styles(["uniform", *(f"method_{i}" for i in range(18)), "trace_rows", "trace"], "uniform", known)
    assert all(method_styles([name], "uniform", known)[name] == styles[name] for name in known)
    assert len({tuple(style.values()) for style in styles.values()}) == 21
    assert styles["uniform"]["color"] not in {style["color"] for method, style in styles.items() if method != "uniform"}


def test_numbers_names_and_intervals_read_well():
    texts = {
        0.0: "0.000", 0.12345: "0.123", 12.345: "12.35", 1234567: "1,234,567", 2500.5: "2,500", 3.1e-11: "3.1e-11",
        math.nan: "–", math.inf: "–", None: "–", np.float64(0.5): "0.500", np.int64(1200): "1,200",
    }  # fmt: skip
    assert {value: format_number(value) for value in texts} == texts and format_number(True) == "yes"
    assert plain_name("neighbour_accuracy") == "neighbour accuracy" and plain_name("forget_nll") == "forget NLL"
    assert format_interval(0.1, 0.2) == "[0.100, 0.200]" and format_interval(None, 0.2) == ""
