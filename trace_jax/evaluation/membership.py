"""Membership inference: can one tell the forget texts from texts that no model has seen?

Seven attacks, each a number per text that is higher the less familiar the text looks. Their AUC is the probability that
a forget text looks more familiar than a holdout text. 1: the attacker finds every forget text; 1/2: chance; below:
forget text was made less likely than text never seen, which gives it away as well.

PrivLeak and its AUC are the other way round, as in MUSE (2407.06460): near 0 for a model that memorised the forget set.
The right value there is that of the retrained model, not 1/2; PrivLeak is the relative distance from it.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from tokenizers import Tokenizer

from trace_jax.data.rows import Rows
from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval, Measurement, named
from trace_jax.evaluation.likelihood import TokenScores, row_texts, score_sequences, spread_indices
from trace_jax.evaluation.task import Task, TaskScores, item_lines
from trace_jax.io.progress import tracked
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import padded_size
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.models.moe import router_probabilities
from trace_jax.models.sharding import map_batches, on_mesh, pad, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, place, row_shards, to_host

MIN_K = 0.4  # share of a text's tokens that Min-K and Min-K++ look at, as in MUSE and open-unlearning
RATE = 0.01
AUC_UNTRAINED = 0.5  # of a model that can't tell forget from holdout texts
SIDES = ("forget", "holdout")  # trained on, and never seen
# And "reference", which needs a second model.
ATTACKS = ("loss", "min_k", "min_k_plus_plus", "zlib", "gradient_norm", "routing")

Sides = tuple[np.ndarray, np.ndarray]  # numbers of the texts of each of SIDES


@dataclasses.dataclass(frozen=True)
class Membership(Task):
    """The attacks on the rows of both sides, by split; the gradients of at most `gradients` texts a side are taken."""

    data: Mapping[str, tuple[Rows, Rows]]
    identity: str
    gradients: int
    name = "membership"

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """How unfamiliar the model finds each of N texts, by "SPLIT/SIDE/ATTACK"; higher is less familiar, f64 [N].

        loss: mean NLL of its scored tokens, nats (Yeom et al. 2018).
        min_k: minus the mean of its least likely tokens' log-probabilities (2310.16789).
        min_k_plus_plus: the same of log-probabilities in units of the model's own spread (2404.02936).
        zlib: loss over the bytes of its scored text, compressed (2012.07805). NaN without a tokenizer.
        gradient_norm: of the loss (`gradient_norms`). NaN for texts whose gradient wasn't taken.
        routing: how much nearer its routing is to the other holdout texts' than to the other forget texts'
          (`resemblance`). NaN with fewer than two texts on a side.
        """
        arrays, lines = {}, []
        for split, both in self.data.items():
            profiles = [routing_profiles(model, *row_texts(rows), batch_size=batch_size, mesh=mesh) for rows in both]
            for side, rows, routing in zip(SIDES, both, resemblance(*profiles), strict=True):
                texts, first = row_texts(rows)
                scores = score_sequences(model, texts, first, moments=True, batch_size=batch_size, mesh=mesh)
                loss = np.array([-one.log_prob.mean(dtype=np.float64) for one in scores])
                norms, chosen = np.full(len(texts), np.nan), spread_indices(len(texts), self.gradients)
                norms[chosen] = gradient_norms(model, [texts[i] for i in chosen], [first[i] for i in chosen], mesh=mesh)
                scored = [text[f:] for text, f in zip(texts, first, strict=True)]
                attacks = {
                    "loss": loss,
                    "min_k": min_k_scores([one.log_prob for one in scores]),
                    "min_k_plus_plus": min_k_plus_plus_scores(scores),
                    "zlib": loss / compressed_sizes(model.tokenizer, scored),
                    "gradient_norm": norms,
                    "routing": routing,
                }
                arrays |= {f"{split}/{side}/{attack}": values for attack, values in attacks.items()}
                lines += item_lines({"split": split, "side": side}, **attacks)
        return TaskScores(arrays, {"items": lines})

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        """AUC and true positive rate of every attack, then PrivLeak and its AUC; nothing where a side has no text."""
        measurements = []
        for split in self.data:
            sides: dict[str, Sides] = {attack: _sides(scores, split, attack) for attack in ATTACKS}
            if not all(len(side) for side in sides["loss"]):
                continue
            reference = None
            if retrained is not None:
                reference = _sides(retrained, split, "min_k")
                forget, holdout = (x - y for x, y in zip(sides["loss"], _sides(retrained, split, "loss"), strict=True))
                sides["reference"] = forget, holdout
            for attack, both in sides.items():
                forget, holdout = (side[~np.isnan(side)] for side in both)
                if not len(forget) or not len(holdout):
                    continue
                note, name = _counts(forget, holdout), f"membership_{attack}"
                why = "; no retrained model, so no reference attack" if attack == "loss" and retrained is None else ""
                auc = intervals.bootstrap_sides(intervals.auc, -forget, -holdout, **resampling)
                measurements.append(named(f"{name}_auc", split, auc, note + why))
                at_rate = functools.partial(intervals.true_positive_rate, rate=RATE)
                rate = intervals.bootstrap_sides(at_rate, -forget, -holdout, **resampling)
                few = f"; none of fewer than {round(1 / RATE)} holdout texts may pass" * (RATE * len(holdout) < 1)
                measurements.append(named(f"{name}_tpr_at_fpr_1", split, rate, note + few))
            note = _counts(*sides["min_k"])
            why = "; no retrained model to compare with, so no PrivLeak" if reference is None else ""
            measurements.append(named("privleak_auc", split, privleak_auc(sides["min_k"], **resampling), note + why))
            if (leak := privleak(sides["min_k"], reference, **resampling)) is not None:
                measurements.append(named("privleak", split, leak, note))
        return measurements


def min_k_scores(values: Sequence[np.ndarray], *, dtype: Any = np.float64) -> np.ndarray:
    """Min-K % Prob (2310.16789) of each text, f64 [N]: minus the mean of the lowest int(0.4 n) of n log-probabilities.

    Of at least one, and 0 for a text without a token, as in open-unlearning, which computes in float32, where more
    texts tie (MUSE's code has no value for texts of fewer than 3 tokens).
    """
    lowest = [np.sort(np.asarray(v, dtype))[: max(1, int(MIN_K * len(v)))] for v in values]
    return np.array([float(-v.mean()) if len(v) else 0.0 for v in lowest])


def min_k_plus_plus_scores(scores: Sequence[TokenScores]) -> np.ndarray:
    """Min-K %++ (2404.02936) of each text, f64 [N]: `min_k_scores` of (log-probability - its mean) / deviation.

    As in open-unlearning, the variance counts as 1e-6 at least: where a model is certain it is 0.
    """
    standardised = []
    for one in scores:
        assert one.mean is not None and one.variance is not None  # they were asked for
        log_prob, mean, variance = (np.asarray(x, np.float64) for x in (one.log_prob, one.mean, one.variance))
        standardised.append((log_prob - mean) / np.sqrt(np.maximum(variance, 1e-6)))
    return min_k_scores(standardised)


def compressed_sizes(tokenizer: Tokenizer | None, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Bytes of each text (token ids) after zlib, f64 [N]; NaN without a tokenizer. Special tokens are no text."""
    if tokenizer is None:
        return np.full(len(texts), np.nan)
    decoded = tokenizer.decode_batch([list(text) for text in texts])
    return np.array([len(zlib.compress(text.encode("utf-8"))) for text in decoded], np.float64)


def gradient_norms(
    model: Model, sequences: Sequence[Sequence[int]], first: Sequence[int], *, mesh: Mesh | None = None
) -> np.ndarray:
    """Euclidean norm over all parameters of the gradient of each text's mean loss: f64 [N] (2402.17012, p = 2).

    `sequence[first:]` is scored, at least one token of each. One text at a time, with memory for one gradient.
    open-unlearning averages the norms of single tensors instead, which depends on how parameters are cut into tensors.
    """
    params = model.unguided("a gradient")
    params = params if mesh is None else placed_params(params, model.config, mesh)
    shards = 1 if mesh is None else row_shards(mesh)
    function, norms = _norm_function(model.config, mesh), []
    for sequence, start in tracked(zip(sequences, first, strict=True), "gradient norms", len(sequences)):
        width, scored = padded_size(len(sequence)), len(sequence) - start
        rows = ([list(x)] * shards for x in (sequence, [1] * len(sequence), sequence[1:]))
        weights = pad([[0.0] * (start - 1) + [1 / scored] * scored], width=width, count=shards, dtype=np.float32)
        arrays = (*(pad(x, width=width) for x in rows), weights)
        arrays = arrays if mesh is None else place(arrays, mesh, PartitionSpec(BATCH_AXES))
        norms.append(float(to_host(function(params, *arrays))))
    return np.array(norms, np.float64)


@functools.lru_cache(maxsize=4)
def _norm_function(config: ModelConfig, mesh: Mesh | None):
    def loss(params, tokens, mask, targets, weights):
        hidden = forward(params, config, tokens, mask=mask, collect=("hidden",), remat="layer").hidden
        assert hidden is not None  # it was asked for
        total = (token_nll(params, config, hidden, targets) * weights).sum()
        return total if mesh is None else jax.lax.psum(total, BATCH_AXES)

    function = loss if mesh is None else on_mesh(loss, config, mesh, out_specs=PartitionSpec())

    def norm(params, *arrays):
        gradient = jax.grad(function)(params, *arrays)
        squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(gradient)]
        return jnp.sqrt(jnp.stack(squares).sum())

    return jax.jit(norm)


def routing_profiles(
    model: Model, sequences: Sequence[Sequence[int]], first: Sequence[int], *, batch_size: int, mesh: Mesh | None
) -> np.ndarray:
    """f64 [N, L (E + 1)]: of each layer the router's mean probability of each expert, and their mean entropy (nats),
    where each text's `sequence[first:]` is predicted.
    """
    params, width = model.unguided("a profile of routing"), padded_size(max(map(len, sequences), default=1))
    scored = [[0.0] * (start - 1) + [1.0] * (len(text) - start) for text, start in zip(sequences, first, strict=True)]
    segments = [[1] * len(text) for text in sequences]
    columns = [pad(x, width=width) for x in (sequences, segments)] + [pad(scored, width=width, dtype=np.float32)]
    batches = ([x[at : at + batch_size] for x in columns] for at in range(0, len(sequences), batch_size))
    passes = map_batches(_profiles, params, model.config, batches, mesh=mesh)
    features = len(model.config.moe_layers) * (model.config.num_experts + 1)
    profiles = np.concatenate([np.zeros((0, features)), *(x[:batch_size] for x in passes)])
    return profiles[: len(sequences)]


def _profiles(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, scored: jax.Array) -> jax.Array:
    router: Any = forward(params, config, tokens, mask=segments, collect=("router_logits",)).router
    probabilities = router_probabilities(router.logits, config)  # [L, B, S, E]
    entropy = jax.scipy.special.entr(probabilities).sum(axis=-1, keepdims=True)
    weights = scored / jnp.maximum(scored.sum(axis=1, keepdims=True), 1.0)
    features = jnp.concatenate([probabilities, entropy], axis=-1)
    return (features * weights[None, :, :, None]).sum(axis=2).swapaxes(0, 1).reshape(len(tokens), -1)


def resemblance(forget: np.ndarray, holdout: np.ndarray) -> Sides:
    """From profiles f64 [N, F] of each side, f64 [N] of each: squared distance to the mean of the forget texts less
    that to the mean of the holdout texts, itself left out of both, in units of each feature's spread. Distances are
    divided by how much larger a mean of so few makes them, so that sides that are alike give an AUC of 1/2.
    """
    if min(len(forget), len(holdout)) < 2:
        return np.full(len(forget), np.nan), np.full(len(holdout), np.nan)
    spread = np.concatenate([forget, holdout]).std(axis=0)
    forget, holdout = (side[:, spread > 0] / spread[spread > 0] for side in (forget, holdout))

    def nearer(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        n, m = len(own), len(other)
        near = ((own - (own.sum(axis=0) - own) / (n - 1)) ** 2).sum(axis=1) * (n - 1) / n
        return near - ((own - other.mean(axis=0)) ** 2).sum(axis=1) * m / (m + 1)

    return nearer(forget, holdout), -nearer(holdout, forget)


def privleak_auc(scores: Sides, profile: str = "muse", **resampling: int) -> Interval:
    """AUC of `min_k_scores` of (forget, holdout) texts, ties counted as one half.

    For a model that remembers the forget texts near 0 in profile "muse", near 1 in "open_unlearning" (`_oriented`).
    """
    return intervals.bootstrap_sides(intervals.auc, *_oriented(scores, profile), **resampling)


def privleak(scores: Sides, retrained: Sides | None, profile: str = "muse", **resampling: int) -> Interval | None:
    """(AUC - AUC_retrained) / AUC_retrained * 100, percent; negative: still remembered, positive: pushed too far.

    Of `min_k_scores` of (forget, holdout) texts, of the model and of one retrained without the forget set, on the same
    texts. AUCs are in MUSE's direction; "open_unlearning" adds 1e-10 to the denominator, and takes 1/2 without a
    retrained model. None where MUSE's definition has no value: no retrained model (it has constants for its own models,
    which say nothing of others), or one whose AUC is zero.
    """
    if retrained is not None and [len(x) for x in scores] != [len(x) for x in retrained]:
        raise ValueError("PrivLeak compares two models on the same texts; the numbers of texts differ.")
    if retrained is None and profile == "muse":
        return None

    def leak(auc: Callable[..., np.ndarray]) -> np.ndarray:
        ours = auc(*_oriented(scores, profile))
        reference = np.full(len(ours), AUC_UNTRAINED) if retrained is None else auc(*_oriented(retrained, profile))
        if profile == "open_unlearning":
            ours, reference = 1 - ours, 1 - reference
            return (ours - reference) / (reference + 1e-10) * 100
        with np.errstate(divide="ignore", invalid="ignore"):
            return (ours - reference) / reference * 100

    value = float(leak(intervals.auc)[0])
    if not math.isfinite(value):
        return None
    resampled = leak(functools.partial(intervals.resampled_sides, intervals.auc, **resampling))
    return intervals.quantile_interval(value, resampled[np.isfinite(resampled)], sum(len(x) for x in scores))


def _sides(scores: TaskScores, split: str, attack: str) -> Sides:
    return scores.arrays[f"{split}/forget/{attack}"], scores.arrays[f"{split}/holdout/{attack}"]


def _oriented(scores: Sides, profile: str) -> Sides:
    """(positives, negatives) whose AUC is the profile's: of the score itself, or in MUSE of its negative."""
    sign = 1.0 if profile == "open_unlearning" else -1.0
    forget, holdout = (sign * np.asarray(side, np.float64) for side in scores)
    return holdout, forget


def _counts(forget: np.ndarray, holdout: np.ndarray) -> str:
    return f"{len(forget)} forget, {len(holdout)} holdout texts"
