"""Methods are compared at equal budgets, with settings chosen on validation and numbers from test."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from trace_jax.evaluation import comparison, comparison_text
from trace_jax.evaluation.comparison import Run, compare
from trace_jax.evaluation.comparison_text import as_text
from trace_jax.evaluation.fronts import MEAN, Front, RunItems, Series
from trace_jax.io.files import encode
from trace_jax.tasks.benchmarks import BENCHMARKS


def front(at_half, *, lowest=0.0, last_step=60):
    """Straight front from (1, 1) that has utility `at_half` at forgetting 0.5."""
    forgetting = np.array([1.0, lowest])
    neighbour, general = 1 - (1 - forgetting) * 2 * (1 - at_half), np.ones(2)
    utilities = {"neighbour_accuracy": neighbour, "general_utility": general, MEAN: (neighbour + general) / 2}
    measured = {"forget_accuracy": forgetting, "neighbour_accuracy": 0.9 * neighbour, "general_utility": general}
    return Front(np.array([0, last_step]), forgetting, utilities, measured)


def study(**tests):
    """Runs of methods: {method: {setting: (validation, [test per seed])}}."""
    return [
        Run(method, setting, seed, front(validation), front(test))
        for method, settings in tests.items()
        for setting, (validation, by_seed) in settings.items()
        for seed, test in enumerate(by_seed)
    ]


RUNS = study(
    uniform={"alpha=4": (0.6, [0.9, 0.9, 0.9]), "alpha=16": (0.7, [0.72, 0.70, 0.74])},
    trace_rows={"alpha=4": (0.9, [0.90, 0.93, 0.92]), "alpha=16": (0.8, [0.99, 0.99, 0.99])},
)


def test_the_setting_is_chosen_on_validation_and_the_gain_is_paired_by_seed():
    """However good another setting is on test."""
    compared = compare(RUNS, level=0.5)
    baseline, result = compared.results
    assert (baseline.method, baseline.setting, len(baseline.tried)) == ("uniform", "alpha=16", 2)
    assert (result.method, result.setting, len(result.tried)) == ("trace_rows", "alpha=4", 2)
    assert all(word in as_text(compared) for word in ("trace_rows", "alpha=4", "3/3"))
    assert result.utilities["neighbour_accuracy"].value == pytest.approx(np.mean([0.90, 0.93, 0.92]))
    gain = result.gains["neighbour_accuracy"]
    ratios = np.array([0.90 / 0.72, 0.93 / 0.70, 0.92 / 0.74]) - 1
    expected = stats.ttest_1samp(ratios, 0.0).confidence_interval(0.95)
    assert gain.value == pytest.approx(ratios.mean())
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    assert baseline.gains[MEAN].value == baseline.area.value == 0
    # Straight fronts from (1, 1): the difference at the middle level is the mean one, here of two utilities.
    assert result.area.value == pytest.approx(np.mean([0.9 - 0.72, 0.93 - 0.70, 0.92 - 0.74]) / 2)


def test_seeds_that_never_forget_enough_count_first_and_are_named_and_not_averaged():
    runs = study(uniform={"gentle": (0.99, [0.99, 0.99]), "firm": (0.8, [0.8, 0.8])})
    runs[1] = dataclasses.replace(runs[1], validation=front(0.99, lowest=0.7))
    tried = [comparison.try_settings(runs, level=level) for level in (0.5, 0.8)]
    assert [*map(comparison.choose_setting, tried)] == ["firm", "gentle"]
    assert tried[0] == {"gentle": (1, pytest.approx(0.995)), "firm": (2, pytest.approx(0.9))}
    runs = [Run("uniform", "a", s, front(0.8), front(0.8, lowest=0.6 if s == 1 else 0.0)) for s in range(3)]
    result = compare(runs, level=0.5).results[0]
    assert (result.seeds, result.missed) == ((0, 2), (1,))
    none = compare(runs, level=-0.1).results[0]
    assert (none.utilities, none.gains, none.missed) == ({}, {}, (0, 1, 2))


def test_settings_chosen_on_other_seeds_are_read_on_the_seeds_that_are_reported_alone():
    """`trace_rows` is better with alpha 16 on the tuning seed, and with 4 on those that are reported."""
    tuning = [
        Run(m, f"alpha={a}", 100, front(v), front(0.1))
        for m in ("uniform", "trace_rows")
        for a, v in ((4, 0.6), (16, 0.7))
    ]
    compared = compare(RUNS, tuning=tuning, level=0.5)
    assert [r.setting for r in compared.results] == ["alpha=16", "alpha=16"]
    assert compared.results[1].utilities["neighbour_accuracy"].value == pytest.approx(0.99)
    assert compared.results[1].tried == {"alpha=4": (1, pytest.approx(0.8)), "alpha=16": (1, pytest.approx(0.85))}
    slow = dataclasses.replace(tuning[-1], validation=front(0.7, lowest=0.45))  # at .5, and not at .4: it may miss
    assert compare(RUNS, tuning=[*tuning[:-1], slow], level=0.5).results[1].setting == "alpha=4"
    assert compared.results[1].seeds == (0, 1, 2) and "chosen on seed 100" in as_text(compared)
    with pytest.raises(ValueError, match="same seeds in the settings"):
        compare([run for run in RUNS if run.method == "uniform" or run.seed], tuning=tuning, level=0.5)


def test_the_widest_bracket_of_a_crossing_is_told():
    """By hand: .8 to .45 and .55 to .5, which is an evaluation at the level."""
    fronts = [
        dataclasses.replace(
            front(0.8), steps=np.arange(3), forgetting=np.array(f), utilities={MEAN: np.ones(3)}, measured={}
        )
        for f in ([1, 0.8, 0.45], [1, 0.55, 0.5])
    ]
    runs = [Run("uniform", "a", seed, each, each) for seed, each in enumerate(fronts)]
    assert compare(runs, level=0.5).results[0].bracket == pytest.approx(0.35)
    assert compare(runs[1:], level=0.5).results[0].bracket == 0
    assert compare(runs, level=0.5, reading="best").results[0].bracket is None


def test_an_unequal_budget_is_refused_unless_the_method_is_labelled_so():
    comparison.check_equal_budgets(RUNS)
    longer = [dataclasses.replace(r, method="uniform_2x", test=front(0.8, last_step=120)) for r in RUNS[:6]]
    for extra, message in (
        (study(uniform={"alpha=48": (0.9, [0.9])}), "different seeds"),
        (study(ngram={"alpha=4": (0.9, [0.9])}), "ngram: 1 settings"),
        (longer, "120 steps"),
    ):
        with pytest.raises(match=message):
            compare([*RUNS, *extra], level=0.5)
    assert compare([*RUNS, *longer], level=0.5, exempt=("uniform_2x",)).exempt == ("uniform_2x",)
    with pytest.raises(ValueError, match="run twice"):
        comparison.check_equal_budgets([*RUNS, RUNS[0]])
    with pytest.raises(ValueError, match="baseline 'tuned'"):
        compare(RUNS, level=0.5, baseline="tuned")


def test_the_best_reading_takes_the_step_from_validation_and_the_value_from_test():
    """The forgetting on test stands beside it: it may not be what validation promised."""

    def dipping(utility, later=0.4):
        forgetting, values = np.array([1.0, 0.4, later, 0.4]), np.array([1.0, *utility])
        utilities = {"general_utility": values, MEAN: values}
        return Front(np.arange(4), forgetting, utilities, {"forget_accuracy": forgetting, "general_utility": values})

    runs = [Run("uniform", "alpha=4", s, dipping([0.5, 0.8, 0.7]), dipping([0.5, 0.75, 0.9], 0.6)) for s in (0, 1)]
    first, best = (compare(runs, level=0.5, reading=reading) for reading in ("first", "best"))
    assert first.results[0].utilities[MEAN].value == pytest.approx(1 - 0.5 * 5 / 6)
    assert best.results[0].utilities[MEAN].value == pytest.approx(0.75)
    assert first.results[0].forgetting is None and best.results[0].forgetting.value == pytest.approx(0.6)
    assert "test forgetting" not in as_text(first) and "0.600" in as_text(best)


# --- with items

QUESTIONS, ROWS = 40, 30


def run_with_items(method, seed, share, *, names=0, luck=0.0):
    """A run whose forgetting crosses 0.5, with `share` of the log-probability of its rows; items named from `names`."""
    rng = np.random.default_rng(seed)
    right = (rng.uniform(size=QUESTIONS)[:, None] < np.array([1.0, 0.7, 0.4, 0.1])).astype(float)
    above = -share * np.arange(4.0) * rng.uniform(50, 150, (ROWS, 1)) * (1 + luck)
    forgetting = Series(np.arange(QUESTIONS) + names, right, np.ones(QUESTIONS), np.ones(QUESTIONS, int), "share")
    general = Series(np.arange(ROWS) + names + 500, above, np.full(ROWS, 100.0), np.ones(ROWS, int), "utility")
    items = RunItems(forgetting, {"general_utility": [general]}, {"general_utility": False})
    utility = np.exp(above.sum(axis=0) / (100 * ROWS))
    line = Front(np.arange(4), right.mean(axis=0), {"general_utility": utility, MEAN: utility}, {})
    return Run(method, "alpha=4", seed, line, line, items)


def pairs(seeds, *, shared=False):
    return [
        run_with_items(method, seed, share, names=0 if shared else 1000 * seed, luck=0.1 * seed)
        for method, share in (("uniform", 0.10), ("trace_rows", 0.08))
        for seed in seeds
    ]


def test_intervals_are_over_seeds_and_items_and_count_items():
    compared = compare(pairs(range(3)), level=0.5)
    assert compared.over == "seeds and items"
    interval, student = (of["utilities"][MEAN] for of in (vars(compared.results[1]), compared.results[1].over_seeds))
    assert interval.n == 3 * ROWS and student.n == 3
    assert interval.value == student.value and interval.low < interval.value < interval.high
    assert compare(pairs(range(3), shared=True), level=0.5).results[1].utilities[MEAN].n == ROWS
    assert "over seeds and items; gains over tuned uniform, paired by seed and item" in as_text(compared)


@pytest.fixture(scope="module")
def one_seed():
    return compare(pairs([0]), level=0.5)


def test_the_gain_is_paired_by_item(one_seed):
    """Both methods do the same to every item, up to a factor: their difference is far more certain than either."""
    gain, utility = one_seed.results[1].gains[MEAN], one_seed.results[1].utilities[MEAN]
    assert gain.high - gain.low < 0.4 * (utility.high - utility.low) / utility.value
    assert 0 < gain.low < gain.value < gain.high
    assert dataclasses.astuple(one_seed.results[0].gains[MEAN])[:3] == (0, 0, 0)


def test_the_crossing_is_found_anew_on_every_resample(one_seed):
    """Utility at a fixed step would not move with the forget questions; at a level of forgetting it does."""
    result = compare(pairs([0]), level=0.5, reading="best").results[0]
    best, first = result.utilities[MEAN], one_seed.results[0].utilities[MEAN]
    assert first.high - first.low > 1.5 * (best.high - best.low)
    assert result.forgetting.low < result.forgetting.value < result.forgetting.high
    assert result.forgetting.n == QUESTIONS


def test_without_other_seeds_or_items_intervals_are_over_the_rest_and_say_so(one_seed):
    assert one_seed.over == "items" and "over items (one seed)" in as_text(one_seed)
    assert np.isnan(one_seed.results[1].over_seeds["gains"][MEAN].low)
    plain = json.loads(json.dumps(encode(one_seed), allow_nan=False))
    assert plain["results"][1]["over_seeds"]["gains"][MEAN]["low"] is None
    runs = pairs(range(3))
    compared = compare([*runs[:-1], dataclasses.replace(runs[-1], items=None)], level=0.5)
    assert compared.over == "seeds" and "over seeds (no items were kept)" in as_text(compared)
    for result in compared.results:
        assert result.utilities == result.over_seeds["utilities"] and result.gains == result.over_seeds["gains"]


def test_the_table_at_equal_forgetting():
    methods = {"uniform": front(0.7), "trace_rows": front(0.9), "timid": front(0.99, lowest=0.8)}
    runs = [Run(name, "", 0, one, one) for name, one in methods.items()]
    table = comparison.equal_forgetting(runs, board=BENCHMARKS["handbook"].board, level=0.5)
    target, uniform, _, timid = table["rows"]
    assert target["name"] == "target model" and target["values"]["neighbour_accuracy"] == pytest.approx(0.9)
    assert uniform["values"]["forget_accuracy"] == pytest.approx(0.5) and uniform["step"] == pytest.approx(30)
    assert uniform["values"]["neighbour_accuracy"] == pytest.approx(0.9 * 0.7)
    assert uniform["between"] == [{"step": 0, "forgetting": 1.0}, {"step": 60, "forgetting": 0.0}]
    assert (timid["reached"], timid["values"], timid["lowest"]) == (False, {}, 0.8)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    lines = comparison_text.equal_forgetting_text(table).splitlines()
    assert lines[0] == "At equal forgetting (forget accuracy <= 0.5), test split"
    assert lines[4].split() == ["uniform", "0.500", "0.630", "1.000", "0.850", "-", "30.0"]
    assert lines[6].endswith("lowest 0.800") and lines[-1].startswith("values lie on straight lines")
    best = "At forget accuracy 0.5 the best mean utility is that of {}, 0.950, +11.8 % over uniform"
    assert comparison_text.conclusion(table) == f"{best.format('trace_rows')}."
    about = {"board": BENCHMARKS["handbook"].board, "level": 0.5}
    controlled = comparison.equal_forgetting(runs, **about, controls=["trace_rows"])
    assert "that of uniform, 0.850; controls and rivals with more: trace_rows 0.950" in comparison_text.conclusion(
        controlled
    )
    missed = comparison.equal_forgetting(runs[2:], **about)
    told = comparison_text.conclusion(missed)
    assert missed["best"] is None and told.startswith("Not reached: no method came down to forget accuracy 0.5 (lowest")
    assert all(name in told for name in ("timid, 0.800", "unlearning.steps", "unlearning.alpha", "evaluation.levels"))


def test_the_interval_of_one_run_holds_where_it_crosses_the_level(one_seed):
    """It is that of a study with this one seed, and wider than that of the utility at a step."""

    def with_measured(run):
        measured = {"forget_accuracy": run.test.forgetting, "general_utility": run.test.utilities[MEAN]}
        return dataclasses.replace(run, test=dataclasses.replace(run.test, measured=measured))

    runs = [*map(with_measured, pairs([0]))]
    table = comparison.equal_forgetting(runs, board=BENCHMARKS["handbook"].board, level=0.5)
    for row, result in zip(table["rows"][1:], one_seed.results, strict=True):
        assert row["intervals"][MEAN] == encode(result.utilities[MEAN])
    assert table["rows"][2]["gains"][MEAN] == encode(one_seed.results[1].gains[MEAN])
    told = comparison_text.study_conclusion(encode(one_seed), "forget_accuracy", ["uniform"])
    assert told.replace("tuned ", "") == f"{comparison_text.conclusion(table)} One seed."
