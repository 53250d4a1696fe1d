"""Handmade probes for the tiny model, and a sharp one: every text that is scored here has one of few shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from trace_jax.data.corpora import Probes, Prompts, Questions
from trace_jax.evaluation.fronts import front_from_history
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.task import EvaluationConfig, Evaluator
from trace_jax.models.architecture import abstract_params
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.tasks.benchmarks import BENCHMARKS
from trace_jax.unlearning.metrics import Metrics

CONFIG, V = tiny.CONFIG, tiny.CONFIG.vocab_size
SETTINGS = EvaluationConfig(batch_size=4, max_rows=5, max_prompts=3, max_members=5, max_gradients=2, bootstrap=100)


@functools.cache
def make_params(seed=0, config=CONFIG):
    """Random parameters (by numpy, which needs no compile), with a sharp head so that tokens differ clearly."""
    rng = np.random.default_rng(seed)

    def draw(path, array):
        scale = {"embed": 1.0, "head": 1.0}.get(path[-1].key, 0.3)
        values = rng.normal(0, scale, array.shape) + ("norm" in path[-1].key)
        return jnp.asarray(values, array.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def make_model(seed=0):
    return Model(CONFIG, make_params(seed), tiny.make_tokenizer())


def make_questions(count, *, options=4, length=14, seed=0, group_size=3, longest=3):
    """A prompt of 3 to 6 tokens and options of 1 to `longest`, behind BOS."""
    rng = np.random.default_rng(seed)
    shape = (count, options, length)
    tokens, segments, scored = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for q in range(count):
        prompt = [1, *rng.integers(3, V, rng.integers(3, 7))]
        for o in range(options):
            option = rng.integers(3, V, rng.integers(1, longest + 1))
            end = len(prompt) + len(option)
            tokens[q, o, :end], segments[q, o, :end] = [*prompt, *option], 1
            scored[q, o, len(prompt) - 1 : end - 1] = True
    answer = rng.integers(0, options, count).astype(np.int32)
    return Questions(tokens, segments, scored, answer, (np.arange(count) // group_size).astype(np.int32))


def make_prompts(count, *, seed=0):
    rng = np.random.default_rng(seed)
    return Prompts(rng.integers(3, V, (count, 5)).astype(np.int32), rng.integers(3, V, (count, 4)).astype(np.int32))


def make_probes(seed=0):
    """Everything that a text benchmark has."""
    return Probes(
        questions={s: make_questions(9, seed=seed + i) for i, s in enumerate(("forget", "neighbour"))},
        text={s: tiny.make_rows(7, seed=seed + 10 + i) for i, s in enumerate(("forget", "neighbour", "general"))},
        prompts={"forget": make_prompts(5, seed=seed)},
        members={s: tiny.make_rows(6, seed=seed + 20 + i) for i, s in enumerate(("forget", "holdout"))},
    )


PROBES = {"test": make_probes(5), "validation": make_probes(0)}


def make_evaluator(probes=PROBES, *, settings=SETTINGS, benchmark="text", tasks=(), mesh=None):
    """An evaluator of probes per split and of other tasks."""
    names = BENCHMARKS[benchmark].board.questions
    return Evaluator(settings, (*probe_tasks(probes, settings, accuracies=names, identity="probes"), *tasks), mesh)


def write_run(directory, evaluator, scores, board):
    """A run of several models, four steps apart: keeps what each item gave, and returns the front on test."""
    history = [(4 * number, evaluator.measure(own)) for number, own in enumerate(scores)]
    for (step, _), own in zip(history, scores, strict=True):
        Metrics(directory, "a").write_items(step, evaluator.outcomes(own))
    return front_from_history(history, board=board, split="test")


@functools.cache
def scores(seed):
    """All scores of a model, computed once."""
    return make_evaluator().score(make_model(seed), full=True)


@jax.jit
def _logits(params, guide, text):
    experts = forward(guide, CONFIG, text[None], collect=("indices",)).router.indices
    return forward(params, CONFIG, text[None], experts=experts).logits[0]


def log_probabilities(params, text, *, guide=None):
    """Full softmax f64 [n, V] after every token of a text that stands alone, through the guide's experts or its own.

    One compile serves all texts: what follows a text can't reach back to it.
    """
    padded = np.zeros(16, np.int32)
    padded[: len(text)] = text
    logits = np.asarray(_logits(params, params if guide is None else guide, padded), np.float64)[: len(text)]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def log_probability(params, text, **options):
    """Of every token of the text but the first, f64 [n - 1]."""
    return log_probabilities(params, text, **options)[np.arange(len(text) - 1), text[1:]]
