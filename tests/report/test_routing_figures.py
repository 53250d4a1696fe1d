"""Figures of routing show the numbers that were measured, on one stated scale, and stay small."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from tests.report.test_report import check_alone
from trace_jax.evaluation.routing import MODELS, SUBJECTS, routing_quantities
from trace_jax.io.drawing import TIMES_UNIFORM, heat_map, scale_of, times
from trace_jax.io.files import encode
from trace_jax.report.figures import layer_plot, method_styles
from trace_jax.report.page import render
from trace_jax.report.routing import GROUPS, MOST_METHODS, STATES, routing_groups


def measure(seed, layers=2, experts=16, top_k=2, *, calibrated=True, dead=None, drift=0.1):
    """What results.json has under "routing", of random counts; expert `dead` of every layer dies on forget text."""
    rng, rows = np.random.default_rng(seed), 6
    tokens = {s: rng.integers(40, 60, rows).astype(float) for s in SUBJECTS}
    corpora = {}
    for s in SUBJECTS:
        share = rng.dirichlet(np.full(experts, 3.0), layers) * top_k
        counts = {m: 1.0 + rng.poisson(tokens[s][:, None, None] * share) for m in MODELS}
        if dead is not None and s == "forget":
            counts["unlearned"][..., dead] = 0.0
        kept = tokens[s][:, None] * rng.uniform(0.5, 1, (rows, layers))
        corpora[s] = {"tokens": tokens[s], "jaccard": kept, "unchanged": 0.8 * kept, **counts}
    by_expert, gap = np.full((layers, experts), drift), rng.uniform(0.2, 0.5, layers)
    layer = {"value": by_expert[:, 0], "low": by_expert[:, 0], "high": by_expert[:, 0]}
    calibration = {"layers": list(range(1, layers + 1)), "effective_sample_size": 0.25}
    if calibrated:
        calibration |= {"gap_before": gap, "gap_after": gap / 4}
    metrics = {
        "layers": calibration["layers"], "top_k": top_k, "expert_drift": by_expert, "calibration": calibration,
        "tokens": {s: int(tokens[s].sum()) for s in SUBJECTS}, "rows": dict.fromkeys(SUBJECTS, rows),
        "frequency": {m: {s: corpora[s][m].sum(axis=0) / tokens[s].sum() for s in SUBJECTS} for m in MODELS},
        "quantities": routing_quantities(corpora, top_k=top_k, resamples=100) | {"router_drift": layer},
    }  # fmt: skip
    return json.loads(json.dumps(encode(metrics, digits=6), allow_nan=False))


def frequency(measured, selected=()):
    first = next(iter(measured.values()))
    forget, retain = (first["frequency"]["original"][s] for s in SUBJECTS)
    shape = np.shape(forget)
    chosen = {method: np.arange(shape[1]) < np.full((shape[0], 1), 2) for method in selected}
    return {
        "forget": forget, "retain": retain, "uniform": first["top_k"] / shape[1], "layers": first["layers"],
        "calibrated": {}, "selected": chosen,
    }  # fmt: skip


def groups_of(measured, selected=()):
    groups = routing_groups(measured, frequency(measured, selected), method_styles(list(measured), "uniform"))
    return {group["title"]: group for group in groups}


def page_of(measured, selected=()):
    front = {"steps": [0], "forgetting": [1.0], "utilities": {"u": [1.0]}}
    methods = {m: {"routing": r, "fronts": {"test": front}, "measurements": []} for m, r in measured.items()}
    config = {"evaluation": {"levels": [0.5]}}
    page = {"title": "x", "benchmark": "x", "forgetting": "y", "chance": None, "methods": methods, "config": config}
    return render(page | {"frequency": frequency(measured, selected)})


@pytest.fixture(scope="module")
def measured():
    return {"uniform": measure(0, calibrated=False), "trace_rows": measure(1, dead=3)}


@pytest.fixture(scope="module")
def groups(measured):
    return groups_of(measured, selected=["trace_rows"])


def pixels(svg):
    """The colours of a map, [layers, experts, 3], the first layer first: the lowest, since the image is turned over."""
    tag = re.search(r"<image.*?/>", svg, re.DOTALL)[0]
    assert float(re.search(r'transform="matrix\(\S+ \S+ \S+ (\S+)', tag)[1]) < 0
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', tag)[1].replace("\n", ""))))
    return np.asarray(image.convert("RGB"))


def colour(scale, value):
    mapped = scale.colour_map()((value - scale.low) / (scale.high - scale.low))
    return np.round(255 * np.array(mapped[:3]))


def test_every_quantity_has_figures(groups):
    assert list(groups) == list(GROUPS)
    captions = {title: [f.caption for f in (*g["panels"], *g["maps"])] for title, g in groups.items()}
    both = ["{}, forget text", "{}, retain text"]
    assert captions["Routing stability"] == [c.format("Stability") for c in both]
    assert captions["Forget against retain text"][:3] == ["Frequency gap", "Jensen-Shannon divergence", "KL divergence"]
    use = {c.format(f"Use, {m}") for m in ("original model", "uniform", "trace_rows") for c in both}
    assert set(captions["Use of each expert"]) == use and len(captions["Use of each expert"]) == 6
    assert captions["Calibration"] == ["Calibration gap, trace_rows", "Effective sample size"]
    for group in groups.values():
        for figure in (*group["panels"], *group["maps"]):
            ET.fromstring(figure.svg)


def test_cells_have_the_colour_that_the_scale_gives_their_number(measured, groups):
    def gap(frequency):
        return np.array(frequency["forget"]) - np.array(frequency["retain"])

    frequencies, group = measured["uniform"]["frequency"], groups["Forget against retain text"]
    values = gap(measured["trace_rows"]["frequency"]["unlearned"])
    assert group["maps"][2].caption == "Forget − retain, trace_rows"
    scale = scale_of([*map(gap, frequencies.values()), values], diverging=True)
    assert scale.legend() == group["scale"]
    expected = [[colour(scale, np.clip(v, scale.low, scale.high)) for v in row] for row in values]
    np.testing.assert_allclose(pixels(group["maps"][2].svg), expected, atol=1)


def test_gains_are_orange_and_losses_purple_and_a_print_in_grey_says_so_too():
    values = np.array([[0.2, -0.2, 0.0]])
    drawn = heat_map(values, scale_of([values], diverging=True), "x", "x")
    red, green, blue = np.moveaxis(pixels(drawn.svg).astype(int), -1, 0)
    assert red[0, 0] > blue[0, 0] and blue[0, 1] > green[0, 1]
    assert np.ptp([red[0, 2], green[0, 2], blue[0, 2]]) < 8
    for scale in (TIMES_UNIFORM, scale_of([values], diverging=True), scale_of([values], diverging=False)):
        greys = [np.array([0.299, 0.587, 0.114]) @ colour(scale, x) for x in np.linspace(scale.low, scale.high, 33)]
        assert (np.diff(greys) < -2).all() and greys[0] - greys[-1] > 150


def test_scales_end_at_round_numbers_that_hold_the_values():
    assert scale_of([np.array([[-0.31, 0.1]])], diverging=True).low == -0.4
    assert scale_of([np.array([[0.012]])], diverging=False).high == 0.015
    assert scale_of([np.zeros((2, 3))], diverging=False).high == 1.0
    outlier = np.r_[np.full(999, 0.1), 50.0]
    assert scale_of([outlier], diverging=True).high == 0.1  # one cell in a hundred may be off the scale
    texts = [text for _, text in scale_of([np.array([0.5])], diverging=True).legend()]
    assert texts == ["−0.5 and less", "−0.25", "0", "+0.25", "+0.5 and more"]
    assert times([[0.5, 0.25, 0.0]], 0.25).tolist() == [[1.0, 0.0, -np.inf]]


def test_an_expert_that_died_is_marked_and_one_that_did_not_is_not(groups):
    maps = {figure.caption: pixels(figure.svg) for figure in groups["Dead experts"]["maps"]}
    legend = {text: np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c, text in STATES.legend()}
    died = maps["Dead experts, trace_rows, forget text"]
    assert (died[:, 3] == legend["newly dead"]).all()
    assert (np.delete(died, 3, axis=1) == legend["used"]).all()
    assert (maps["Dead experts, uniform, forget text"] == legend["used"]).all()


def test_without_dead_experts_or_drift_there_is_no_empty_figure():
    """Also without intervals."""
    measured = {"uniform": measure(0, drift=0.0)}
    for quantity in measured["uniform"]["quantities"].values():
        quantity["low"] = quantity["high"] = [None, None]
    groups = groups_of(measured)
    assert list(groups) == list(GROUPS)
    for title in ("Dead experts", "Router drift"):
        assert (groups[title]["panels"], groups[title]["maps"]) == ([], [])
    assert "Here there is none, before or after" in page_of(measured)


def test_points_stand_where_their_values_are():
    values = {"uniform": [0.2, 0.4, 0.6], "trace": [0.4, 0.6, 0.8]}
    quantities = {m: {"layers": [3, 4, 5], "value": v, "low": v, "high": v} for m, v in values.items()}
    styles = method_styles(list(values), "uniform")
    svg = layer_plot(quantities, styles, "p", "x", original=None, limits=(0.0, 1.0)).svg
    found = re.findall(r'<use [^>]*?href="#[^"]*-m\w+"[^>]*? x="([\d.]+)" y="([\d.]+)"[^>]*?fill: var\(--series', svg)
    places = np.array(found, float).reshape(2, 3, 2)
    heights = -places[..., 1]  # upwards
    unit = heights[0, 1] - heights[0, 0]
    np.testing.assert_allclose(heights - heights[0, 0], [[0, unit, 2 * unit], [unit, 2 * unit, 3 * unit]], atol=1e-3)
    assert unit > 0 and (np.diff(places[..., 0], axis=1) > 0).all()
    assert (places[0, :, 0] < places[1, :, 0]).all()  # side by side
    assert all(text in svg for text in (">3<", ">5<", ">layer<"))


def test_selected_experts_are_outlined_where_cells_are_wide_enough(groups):
    outlined = {f.caption: "LineCollection" in f.svg for f in groups["Change of use"]["maps"]}
    assert outlined == {f"Change, {m}, {s} text": True for m in ("uniform", "trace_rows") for s in SUBJECTS}
    assert groups["Change of use"]["outlined"]
    wide = groups_of({"trace": measure(0, experts=128)}, selected=["trace"])["Change of use"]
    assert not wide["outlined"] and not any("LineCollection" in f.svg for f in wide["maps"])


def test_the_section_is_folded_and_stands_alone(measured):
    page = page_of(measured, selected=["trace_rows"])
    check_alone(page)
    assert '<h2 id="routing">' in page and "<details><summary>Routing, quantity by quantity" in page
    assert f"{measured['uniform']['tokens']['forget']} forget tokens of 6 rows" in page


def test_many_methods_on_a_large_model_stay_small():
    one = measure(0, layers=48, experts=128, top_k=8, dead=0)
    page = page_of({f"method_{i}": one for i in range(6)})
    assert page.count('aria-label="Change, ') == 2 * MOST_METHODS
    assert len(page.encode()) < 1_500_000
    assert "the arrays of 2 more are in results.json" in page
