"""A tiny random model and handmade probes, for every test of this room that needs a forward pass."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from trace_jax.data.corpora import Probes, Prompts, Questions
from trace_jax.data.rows import Rows
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.task import Evaluator
from trace_jax.models.arrays import abstract_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model
from trace_jax.tasks.benchmarks import scoreboard

V = 37
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    num_experts=4,
    experts_per_token=2,
    expert_hidden_size=8,
)


def make_params(seed=0):
    """Random parameters (by numpy, which needs no compile), with a sharp head so that tokens differ clearly."""
    rng = np.random.default_rng(seed)

    def draw(path, array):
        scale = {"embed": 1.0, "head": 1.0}.get(path[-1].key, 0.3)
        values = rng.normal(0, scale, array.shape) + ("norm" in path[-1].key)
        return jnp.asarray(values, array.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))


def make_rows(count, *, length=12, seed=0):
    """Rows of one to two documents with padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, V, (count, length)).astype(np.int32)
    segments, place = np.zeros((count, length), np.int32), np.arange(length)
    for row in range(count):
        first, last = rng.integers(3, length // 2 + 1), rng.integers(length // 2 + 2, length + 1)
        segments[row] = np.where(place < first, 1, np.where(place < last, 2, 0))
    tokens[segments == 0] = 0
    following = np.concatenate([segments[:, 1:], np.zeros((count, 1), np.int32)], axis=1)
    valid = (segments > 0) & (segments == following)
    return Rows(tokens, segments, valid, np.zeros(count, np.int32))


def make_questions(count, *, options=4, length=14, seed=0, group_size=3):
    """A prompt of 3 to 6 tokens and options of 1 to 3, behind BOS."""
    rng = np.random.default_rng(seed)
    shape = (count, options, length)
    tokens, segments, scored = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for q in range(count):
        prompt = [1, *rng.integers(3, V, rng.integers(3, 7))]
        for o in range(options):
            option = rng.integers(3, V, rng.integers(1, 4))
            end = len(prompt) + len(option)
            tokens[q, o, :end], segments[q, o, :end] = [*prompt, *option], 1
            scored[q, o, len(prompt) - 1 : end - 1] = True
    answer = rng.integers(0, options, count).astype(np.int32)
    return Questions(tokens, segments, scored, answer, (np.arange(count) // group_size).astype(np.int32))


def make_prompts(count, *, seed=0):
    rng = np.random.default_rng(seed)
    return Prompts(rng.integers(3, V, (count, 5)).astype(np.int32), rng.integers(3, V, (count, 4)).astype(np.int32))


def make_probes(seed=0, *, questions=("forget", "neighbour"), text=("general",), members=True):
    return Probes(
        questions={s: make_questions(9, seed=seed + i) for i, s in enumerate(questions)},
        text={s: make_rows(7, seed=seed + 10 + i) for i, s in enumerate(text)},
        prompts={"forget": make_prompts(5, seed=seed)},
        members={s: make_rows(6, seed=seed + 20 + i) for i, s in enumerate(("forget", "holdout"))} if members else {},
    )


def make_tokenizer():
    """Every id is a word of its own."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_model(seed=0):
    return Model(CONFIG, make_params(seed), make_tokenizer())


def make_evaluator(settings, probes, *, benchmark="text", tasks=(), identity="probes", mesh=None):
    """An evaluator of probes per split and of other tasks."""
    names = scoreboard(benchmark).questions
    return Evaluator(settings, (*probe_tasks(probes, settings, accuracies=names, identity=identity), *tasks), mesh)


@pytest.fixture(scope="session")
def tiny():
    """The functions above, with the configuration and parameters that most tests use."""
    makers = (
        make_params,
        make_rows,
        make_questions,
        make_prompts,
        make_probes,
        make_tokenizer,
        make_model,
        make_evaluator,
    )
    return types.SimpleNamespace(config=CONFIG, params=make_params(), **{f.__name__: f for f in makers})
