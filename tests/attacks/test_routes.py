"""The search over routes: it is the greedy one of F-SOUR, and what it finds is judged by what it finds elsewhere."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import handmade
from tests.attacks.conftest import CONFIG, emptied, value
from trace_jax.attacks.routes import RouteSearch
from trace_jax.models.decoder import forward

TRIES = 2


@jax.jit
def likelihood(params, tokens, answer, route):
    return jax.nn.log_softmax(forward(params, CONFIG, tokens[None], experts=route).logits[0, -2])[answer]


def greedy(params, tokens, answer, number, seed):
    """(before, after) of one text whose last token is `answer`'s place, by `search_best_expert_routing` of F-SOUR's
    code (TrustAIRLab/UnsafeMoE, 74e59c5, control_router.py): of each token and layer the best of N choices, if it
    beats what the route gave before. Our draws stand for its own.
    """
    route, step = np.full((CONFIG.num_layers, 1, len(tokens), 1), -1, np.int32), 0
    before = best = float(likelihood(params, tokens, answer, route))
    for place in range(len(tokens) - 1):
        for layer in range(CONFIG.num_layers):
            baseline, kept = best, None
            for _ in range(TRIES):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
                route[layer, 0, place] = np.argmax(jax.random.uniform(key, (CONFIG.num_experts,)))
                if (found := float(likelihood(params, tokens, answer, route))) > best:
                    best, kept = found, route[layer, 0, place].copy()
                route[layer, 0, place], step = -1, step + 1
            if best > baseline:
                route[layer, 0, place] = kept
    return before, best


def test_every_option_is_searched_for_as_f_sour_does(original, probes, make_case):
    context = make_case(RouteSearch(tries=TRIES, questions=3), original.params).context
    (search,) = context.prepared.tasks
    scores = search.score(original, batch_size=5, mesh=context.mesh).arrays
    (questions,) = search.data.values()
    assert np.array_equal(questions.answer, probes.questions["forget"].answer[[0, 2, 5]])
    for number, options in enumerate(questions.tokens):
        for option, tokens in enumerate(options):
            expected = greedy(original.params, tokens, tokens[-1], number, context.seed)
            found = [scores[f"test/forget/{name}"][number, option] for name in ("before", "log_likelihood")]
            assert found == pytest.approx(expected, rel=1e-5)


def test_what_a_search_brings_back_stands_beside_what_it_makes_up(original, make_case):
    """Without experts no route is better than another; and any model can be led to any option."""
    stranger = original.replace(params=handmade.make_params(3, CONFIG))
    case = make_case(RouteSearch(tries=4), emptied(original.params), load_retrained=lambda: stranger)
    (point,) = case.context.attack.points(case)
    assert point.at == "4 tries a token and layer"
    assert value(point.original, "forget_accuracy") > value(point.retrained, "forget_accuracy")
    for name in ("route_gain_right", "route_gain_wrong"):
        assert value(point.measurements, name) == 0
        assert value(point.retrained, name) > 0.5
    again = case.context.attack.points(case)
    assert [m.value for m in again[0].retrained] == [m.value for m in point.retrained]


def test_without_questions_there_is_nothing_to_search_for(original, make_case, evaluator, capsys):
    texts = dataclasses.replace(evaluator, tasks=tuple(t for t in evaluator.tasks if t.name != "questions"))
    case = make_case(RouteSearch(), original.params, evaluator=texts)
    assert case.context.attack.points(case) == []
    assert "no questions" in capsys.readouterr().err
