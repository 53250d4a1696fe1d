"""Published benchmarks' scoreboards: halves of their questions, and fronts that other items would have given."""

import numpy as np
import pytest
from scipy import stats

from tests import handmade
from trace_jax.evaluation.fronts import MEAN, load_run_items, make_draws
from trace_jax.evaluation.task import Evaluator, MuseConfig, TaskScores, TofuConfig
from trace_jax.tasks.muse import MuseTask
from trace_jax.tasks.tofu import SETS, TofuTask
from trace_jax.tasks.tofu import Question as Pair
from trace_jax.tasks.wmdp import MultipleChoice, Question

N = 13


def wmdp():
    sources = ("wmdp_bio", "wmdp_cyber", "mmlu", "own")
    asked = tuple(Question(s, s, i, f"{s} {i}", i % 4) for s in sources for i in range(N))
    task = MultipleChoice(asked, dict.fromkeys(sources, N), dict.fromkeys(sources, ""))
    return task, lambda rng: {"log_likelihood": rng.random((len(asked), 4))}


def muse():
    pairs = tuple((f"question {i}", "answer") for i in range(N))
    data = {"verbmem": pairs, "questions": {"forget": pairs, "retain": pairs[:5]}}
    sizes = {"verbmem": N, "knowmem_forget": N, "knowmem_retain": 5, "forget_min_k": N, "holdout_min_k": N}
    task = MuseTask(MuseConfig("", profiles=("muse",)), data, "", "")
    return task, lambda rng: {f"muse_{name}": 100 * rng.random(n) for name, n in sizes.items()}


def tofu():
    sets = {name: [Pair(f"{name} {i}", "a", "b", ("c",)) for i in range(N - k)] for k, name in enumerate(SETS)}

    def draw(rng):
        arrays = {}
        for name, asked in sets.items():
            own = {key: -rng.exponential(1.0, len(asked)) for key in ("answer", "correct")}
            own |= {"wrong": -rng.exponential(1.0, (len(asked), 3)), "rouge": rng.random((len(asked), 2))}
            own |= {key: rng.random(len(asked)) for key in ("extraction_strength", "exact_memorization")}
            arrays |= {f"{name}/{key}": values for key, values in own.items()}
        return arrays

    return TofuTask(TofuConfig(), sets, ""), draw


@pytest.mark.parametrize("make", [wmdp, muse, tofu])
def test_a_front_on_half_of_the_questions_has_its_items(make, tmp_path):
    """Drawn once each they give the front."""
    task, draw = make()
    scores = [{task.name: TaskScores(draw(np.random.default_rng(seed)))} for seed in (0, 4, 8, 99)]
    references = {"original": scores[0], "retrained": scores.pop()}
    evaluator = Evaluator(handmade.SETTINGS, (task,), **references)
    measured = evaluator.measure(scores[0])
    halves = {m.split: m for m in measured if m.name == task.board.forgetting}
    assert halves["validation"].n - halves["test"].n in (0, 1) and halves["validation"].value != halves["test"].value
    front = handmade.write_run(tmp_path, evaluator, scores, task.board)
    items = load_run_items(tmp_path, front, task.board)
    forgetting, utilities = items.resampled(lambda names: np.ones((1, len(names))))
    np.testing.assert_allclose(forgetting[0], front.forgetting, rtol=1e-6)
    np.testing.assert_allclose(utilities[MEAN][0], front.utilities[MEAN], rtol=1e-6)
    assert front.utilities[MEAN][0] == 1
    counted = {name: sum(items.counts(name).values()) for name in front.utilities}
    assert set(counted.values()) == {m.n for m in measured if m.name in task.board.utilities and m.split == "test"}


def test_the_distance_of_a_resample_is_that_of_repeated_items(tmp_path):
    task, draw = tofu()
    one, other = (TaskScores(draw(np.random.default_rng(seed))) for seed in (0, 1))
    evaluator = Evaluator(handmade.SETTINGS, (task,), original={"tofu": one}, retrained={"tofu": other})
    front = handmade.write_run(tmp_path, evaluator, [{"tofu": one}], task.board)
    items, draws = load_run_items(tmp_path, front, task.board), make_draws(resamples=4, seed=1)
    ratios = [s.arrays["forget/wrong"].mean(axis=1)[1::2] - s.arrays["forget/correct"][1::2] for s in (one, other)]
    for found, counts in zip(items.resampled(draws)[0][:, 0], draws(items.forgetting.names), strict=True):
        mine, theirs = (np.repeat(ratio, counts.astype(int)) for ratio in ratios)
        assert found == pytest.approx(stats.ks_2samp(mine, theirs).statistic)
