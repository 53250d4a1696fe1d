"""How near the domains of a study are to one of them, by routing, words, hidden states and gradients of a model."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import trace_jax as tj
from trace_jax.models.loss import token_nll
from trace_jax.routing.controls import ngram_log_ratio

BUCKETS = 10_007  # of hashed pairs of tokens


class Features(NamedTuple):
    """What domains are compared by: of each domain (first axis) and of its tokens on average."""

    frequency: np.ndarray  # f64 [N, L, E]
    hidden: np.ndarray  # f64 [N, D], final states
    square: np.ndarray  # f64 [N, D], their squares
    words: np.ndarray  # f64 [N, V + BUCKETS], frequencies of tokens and of pairs of tokens
    gradients: np.ndarray  # f64 [N, N], inner products of the gradients of the mean NLL by all parameters
    sizes: np.ndarray  # f64 [N, N], the same of their absolute values
    loss: np.ndarray  # f64 [N], the mean NLL


@functools.partial(jax.jit, static_argnums=1)
def _gradient(params, config, batch):
    def loss(params):
        hidden = tj.forward(params, config, batch.tokens, mask=batch.segments, collect=("hidden",)).hidden
        nll = token_nll(params, config, hidden, jax.numpy.roll(batch.tokens, -1, axis=1))
        states = jax.numpy.where(batch.valid[..., None], hidden, 0.0)
        moments = states.sum(axis=(0, 1)), (states**2).sum(axis=(0, 1))
        total = jax.numpy.where(batch.valid, nll, 0.0).sum()
        return total, (total, *moments)

    gradient, sums = jax.grad(loss, has_aux=True)(params)
    return jax.numpy.concatenate([x.ravel() for x in jax.tree.leaves(gradient)]), sums


def features(model: tj.Model, train: Mapping[str, tj.Rows], *, most: int = 64, gradient_rows: int = 32) -> Features:
    """Of the first `most` training rows, since what a method may see is the retain set; of fewer by gradients."""
    train = {name: rows.take(np.arange(min(most, len(rows)))) for name, rows in train.items()}
    frequency, words, gradients, rest = [], [], [], []
    for rows in train.values():
        frequency.append(tj.expert_statistics(model, rows).frequency)
        tokens, following = rows.tokens[rows.valid], np.roll(rows.tokens, -1, axis=1)[rows.valid]
        size = model.config.vocab_size
        pairs = (tokens.astype(np.int64) * size + following) % BUCKETS
        counts = np.concatenate([np.bincount(tokens, minlength=size), np.bincount(pairs, minlength=BUCKETS)])
        words.append(counts / len(tokens))
        few = rows.take(np.arange(min(gradient_rows, len(rows))))
        gradient, sums = _gradient(model.params, model.config, few.batch(np.arange(len(few))))
        gradients.append(np.asarray(gradient) / few.valid.sum())
        rest.append([np.asarray(x, np.float64) / few.valid.sum() for x in sums])
    stacked, (loss, hidden, square) = np.stack(gradients), map(np.stack, zip(*rest, strict=True))
    products = _products(stacked), _products(np.abs(stacked))
    return Features(np.stack(frequency), hidden, square, np.stack(words), *products, loss)


def _products(rows: np.ndarray) -> Any:
    """f64 [N, N]: inner products of rows f32 [N, P], summed in float64 over parts of P."""
    parts = np.array_split(rows, max(1, rows.shape[1] // 4096), axis=1)
    return sum((part @ part.T).astype(np.float64) for part in parts)


def _projection(values: np.ndarray, variance: np.ndarray, topic: int) -> np.ndarray:
    """f64 [N]: values [N, F] of domains, centred on all but the topic and scaled, along the topic's direction."""
    scale = 1 / np.sqrt(np.where(variance > 1e-12, variance, np.inf))
    scaled = (values - np.delete(values, topic, axis=0).mean(axis=0)) * scale
    return scaled @ scaled[topic] / max(float(np.linalg.norm(scaled[topic])), 1e-12)


def _cosine(values: np.ndarray, topic: int) -> np.ndarray:
    norms = np.linalg.norm(values, axis=1)
    return values @ values[topic] / np.maximum(norms * norms[topic], 1e-12)


def nearness(of: Features, train: Mapping[str, tj.Rows], topic: str, *, few: int, draws: int = 20) -> dict[str, Any]:
    """By predictor f64 [N] (of "random experts" [draws, N]); the retain set is every domain but the topic."""
    names = list(train)
    t, others = names.index(topic), [n for n in names if n != topic]
    retain = {name: np.delete(x, t, axis=0).mean(axis=0) for name, x in of._asdict().items()}
    f, domains = retain["frequency"], len(names)
    difference = of.frequency[t] - f
    order = np.argsort(-difference, axis=1, kind="stable")

    def routed(chosen: np.ndarray) -> np.ndarray:
        """chosen i64 [L, k], experts of each layer."""
        values = np.take_along_axis(of.frequency, chosen[None], axis=2).reshape(domains, -1)
        variance = np.take_along_axis(f * (1 - f), chosen, axis=1).ravel()
        return _projection(values, variance, t)

    rng, count = np.random.default_rng(0), min(few, f.shape[1] // 2)
    random = [
        routed(np.stack([rng.choice(layer[count:], count, replace=False) for layer in order])) for _ in range(draws)
    ]
    logs = ngram_log_ratio(train[topic], tj.Rows.concatenate([train[n] for n in others]))
    ends = np.cumsum([len(train[n]) for n in others])
    ratio = {
        n: logs[end - len(train[n]) : end].sum() / train[n].valid.sum() for n, end in zip(others, ends, strict=True)
    }

    def cosine_of(products: np.ndarray) -> np.ndarray:
        lengths = np.sqrt(np.diag(products))
        return products[t] / np.maximum(lengths * lengths[t], 1e-30)

    return {
        "routing, all experts": routed(order),
        "routing, few critical experts": routed(order[:, :count]),
        "routing, few random experts": np.stack(random),
        "n-gram ratio": np.array([ratio.get(n, math.nan) for n in names]),
        "hidden states": _cosine(of.hidden, t),
        "gradient": cosine_of(of.gradients),
        # other readings, so that none loses by how it was read
        "routing, cosine": _cosine((of.frequency - f).reshape(domains, -1), t),
        "n-grams, projected as routing": _projection(
            of.words, retain["words"] * (1 - np.minimum(retain["words"], 1)), t
        ),
        "hidden states, projected as routing": _projection(of.hidden, retain["square"] - retain["hidden"] ** 2, t),
        "gradient, inner product": of.gradients[t],
        "gradient, absolute values": cosine_of(of.sizes),
        "the domain's own loss": of.loss,
    }
