"""Figures of routing show the numbers that were measured, on one stated scale, and stay small."""

import base64
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from trace_jax.evaluation.calibration import CalibrationMetrics
from trace_jax.evaluation.routing import MODELS, SUBJECTS, CorpusRouting, RoutingMetrics, _exact, routing_quantities
from trace_jax.report import ReportData, Routing, render_report
from trace_jax.report.figures import method_styles
from trace_jax.report.heat_maps import TIMES_UNIFORM, Scale, diverging, heat_map, sequential, times_uniform
from trace_jax.report.layer_plots import layer_plot
from trace_jax.report.routing_figures import MOST_METHODS, STATES, corpus_figures, routing_groups

TITLES = [
    *("Top-K overlap with the original model", "Routing stability", "Use of each expert", "Change of use"),
    *("Forget against retain text", "Evenness of the load", "Dead experts", "Router drift", "Calibration"),
]


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
        corpora[s] = CorpusRouting(tokens[s], counts, kept, 0.8 * kept)
    quantities = routing_quantities(corpora, top_k=top_k, resamples=100)
    by_expert = np.full((layers, experts), drift)
    sums = {s: corpora[s].summed(np.ones((1, rows))) for s in SUBJECTS}
    metrics = RoutingMetrics(
        layers=list(range(1, layers + 1)),
        top_k=top_k,
        experts=experts,
        tokens={s: int(tokens[s].sum()) for s in SUBJECTS},
        rows=dict.fromkeys(SUBJECTS, rows),
        frequency={m: {s: sums[s].frequency(m)[0] for s in SUBJECTS} for m in MODELS},
        expert_drift=by_expert,
        quantities=quantities | {"router_drift": _exact(by_expert[:, 0])},
    )
    calibration = CalibrationMetrics(metrics.layers, 300, 0.25, 4.0)
    if calibrated:
        gap = rng.uniform(0.2, 0.5, layers)
        calibration = dataclasses.replace(
            calibration, selected=np.full(layers, 3), gap_before=gap, gap_after=gap / 4,
            gap_elsewhere_before=gap, gap_elsewhere_after=gap,
        )  # fmt: skip
    return json.loads(json.dumps(metrics.to_json() | {"calibration": calibration.to_json()}, allow_nan=False))


def routing(measured, selected=()):
    first = next(iter(measured.values()))
    forget, retain = (first["frequency"]["original"][s] for s in SUBJECTS)
    shape = np.shape(forget)
    chosen = {method: np.arange(shape[1]) < np.full((shape[0], 1), 2) for method in selected}
    return Routing(forget, retain, first["top_k"] / shape[1], {}, chosen, first["layers"], measured)


def groups_of(data):
    groups = routing_groups(data, method_styles(list(data.measured), "uniform"))
    return {group.title: group for group in groups}


@pytest.fixture(scope="module")
def small():
    measured = {"uniform": measure(0, calibrated=False), "trace_rows": measure(1, dead=3)}
    data = routing(measured, selected=["trace_rows"])
    return data, groups_of(data)


def pixels(svg):
    """The colours of a map, [layers, experts, 3], the first layer first: the lowest, since the image is turned over."""
    tag = re.search(r"<image.*?/>", svg, re.DOTALL)[0]
    assert float(re.search(r'transform="matrix\(\S+ \S+ \S+ (\S+)', tag)[1]) < 0
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', tag)[1].replace("\n", ""))))
    return np.asarray(image.convert("RGB"))


def colour(scale, value):
    mapped = scale.colour_map()((value - scale.low) / (scale.high - scale.low))
    return np.round(255 * np.array(mapped[:3]))


def test_every_quantity_has_figures_and_says_how_to_read_them(small):
    _, groups = small
    assert list(groups) == TITLES
    captions = {title: [f.caption for f in (*g.panels, *g.maps)] for title, g in groups.items()}
    both = ["{}, forget text", "{}, retain text"]
    assert captions["Routing stability"] == [c.format("Stability") for c in both]
    assert captions["Forget against retain text"][:3] == ["Frequency gap", "Jensen-Shannon divergence", "KL divergence"]
    assert captions["Use of each expert"] == [
        c.format(f"Use, {m}") for m in ("original model", "uniform", "trace_rows") for c in both
    ]
    assert captions["Calibration"] == ["Calibration gap, trace_rows", "Effective sample size"]
    assert all(group.hint.endswith(".") for group in groups.values())
    for group in groups.values():
        assert bool(group.maps) == bool(group.scale)
        for figure in (*group.panels, *group.maps):
            ET.fromstring(figure.svg)


def test_cells_have_the_colour_that_the_scale_gives_their_number(small):
    data, groups = small
    after = data.measured["trace_rows"]["frequency"]["unlearned"]
    values = np.array(after["forget"]) - np.array(after["retain"])
    figure = groups["Forget against retain text"].maps[2]
    assert figure.caption == "Forget less retain, trace_rows"
    uniform = data.measured["uniform"]["frequency"]
    all_values = [np.array(f["forget"]) - np.array(f["retain"]) for f in (*uniform.values(), after)]
    scale = diverging(all_values)
    assert scale.legend() == groups["Forget against retain text"].scale
    expected = [[colour(scale, np.clip(v, scale.low, scale.high)) for v in row] for row in values]
    np.testing.assert_allclose(pixels(figure.svg), expected, atol=1)


def test_gains_are_orange_losses_purple_and_nothing_is_pale():
    values = np.array([[0.2, -0.2, 0.0]])
    red, green, blue = np.moveaxis(pixels(heat_map(values, diverging([values]), "x", "x")).astype(int), -1, 0)
    assert red[0, 0] > blue[0, 0] and blue[0, 1] > red[0, 1]
    assert min(red[0, 2], green[0, 2], blue[0, 2]) > 230


def test_scales_end_at_round_numbers_that_hold_the_values():
    assert (diverging([np.array([[-0.31, 0.1]])]).low, sequential([np.array([[0.012]])]).high) == (-0.4, 0.015)
    assert sequential([np.zeros((2, 3))]).high == 1.0
    outlier = np.r_[np.full(999, 0.1), 50.0]
    assert diverging([outlier]).high == 0.1  # one cell in a hundred may be off the scale
    texts = [text for _, text in diverging([np.array([0.5])]).legend()]
    assert texts == ["−0.5 and less", "−0.25", "0", "+0.25", "+0.5 and more"]
    assert times_uniform([[0.5, 0.25, 0.0]], 0.25).tolist() == [[1.0, 0.0, -np.inf]]


def test_categories_are_drawn_in_their_own_colours():
    states = Scale(-0.5, 2.5, ("#000000", "#ff0000", "#0000ff"), ((0, "a"), (1, "b"), (2, "c")))
    assert states.legend() == [("#000000", "a"), ("#ff0000", "b"), ("#0000ff", "c")]
    assert pixels(heat_map([[0, 1, 2]], states, "x", "x")).tolist() == [[[0, 0, 0], [255, 0, 0], [0, 0, 255]]]


def test_an_expert_that_died_is_marked_and_one_that_did_not_is_not(small):
    _, groups = small
    maps = {figure.caption: pixels(figure.svg) for figure in groups["Dead experts"].maps}
    legend = {text: np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c, text in STATES.legend()}
    died = maps["Dead experts, trace_rows, forget text"]
    assert (died[:, 3] == legend["newly dead"]).all()
    assert (np.delete(died, 3, axis=1) == legend["used"]).all()
    assert (maps["Dead experts, uniform, forget text"] == legend["used"]).all()


def test_where_no_expert_is_dead_there_are_no_maps_of_dead_experts():
    group = groups_of(routing({"uniform": measure(0)}))["Dead experts"]
    assert not group.maps and "there is none" in group.hint and len(group.panels) == 2


def test_frozen_routers_have_a_plot_and_no_maps():
    group = groups_of(routing({"uniform": measure(0, drift=0.0)}))["Router drift"]
    assert len(group.panels) == 1 and not group.maps


def marks(svg):
    """Places of the markers, [n, 2] in the order drawn, y upwards."""
    found = re.findall(r'<use [^>]*?href="#[^"]*-m\w+"[^>]*? x="([\d.]+)" y="([\d.]+)"[^>]*?fill: var\(--series', svg)
    return np.array(found, float) * (1, -1)


def test_points_stand_where_their_values_are():
    values = {"uniform": [0.2, 0.4, 0.6], "trace": [0.4, 0.6, 0.8]}
    quantities = {m: ([3, 4, 5], {"value": v, "low": v, "high": v}) for m, v in values.items()}
    svg = layer_plot(quantities, method_styles(list(values), "uniform"), "p", "x", original=None, limits=(0.0, 1.0))
    places = marks(svg).reshape(2, 3, 2)
    heights = places[..., 1]
    unit = heights[0, 1] - heights[0, 0]
    np.testing.assert_allclose(heights - heights[0, 0], [[0, unit, 2 * unit], [unit, 2 * unit, 3 * unit]], atol=1e-3)
    assert unit > 0 and (np.diff(places[..., 0], axis=1) > 0).all()
    assert (places[0, :, 0] < places[1, :, 0]).all()  # side by side
    for text in (">3<", ">5<", ">layer<"):
        assert text in svg


def test_intervals_that_are_not_known_break_no_plot():
    one = measure(0)
    for quantity in one["quantities"].values():
        quantity["low"] = quantity["high"] = [None, None]
    assert list(groups_of(routing({"uniform": one}))) == TITLES


def test_selected_experts_are_outlined_where_cells_are_wide_enough(small):
    _, groups = small
    outlined = {f.caption: "LineCollection" in f.svg for f in groups["Change of use"].maps}
    assert outlined == {
        f"Change, {m}, {s} text": m == "trace_rows" for m in ("uniform", "trace_rows") for s in SUBJECTS
    }
    assert groups["Change of use"].outlined
    wide = groups_of(routing({"trace": measure(0, experts=128)}, selected=["trace"]))
    assert not wide["Change of use"].outlined
    assert not any("LineCollection" in f.svg for f in wide["Change of use"].maps)


def test_the_first_figures_need_no_measurement():
    frequency = np.full((2, 4), 0.5)
    captions = [f.caption for f in corpus_figures(Routing(frequency, frequency, 0.5, {"trace": frequency}))]
    assert captions == ["Forget set", "Retain set, before", "Retain set, calibrated by trace"]
    assert TIMES_UNIFORM.legend()[2][1] == "uniform (K/E)"


def test_the_section_is_folded_and_its_ids_are_its_own(small):
    page = render_report(ReportData(title="x", routing=small[0]))
    assert "<h2>Routing after unlearning</h2>" in page and "<details><summary>Routing, quantity by quantity" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    tokens = small[0].measured["uniform"]["tokens"]
    assert f"{tokens['forget']} forget tokens of 6 rows" in page
    without = dataclasses.replace(small[0], measured={})
    assert "Routing after unlearning" not in render_report(ReportData(title="x", routing=without))


def test_many_methods_on_a_large_model_stay_small():
    measured = {f"method_{i}": measure(i, layers=48, experts=128, top_k=8, dead=i) for i in range(6)}
    data = routing(measured, selected=list(measured))
    groups = groups_of(data)
    assert len(groups["Change of use"].maps) == 2 * MOST_METHODS
    page = render_report(ReportData(title="x", routing=dataclasses.replace(data, selected={})))
    assert len(page.encode()) < 1_500_000
    assert "the arrays of 2 more are in results.json" in page
