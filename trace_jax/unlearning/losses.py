"""What a device computes from its rows: forward passes of both models, forget and retain losses, their gradient.

Every loss is a sum that is added over devices and divided by a count of the whole batch, so that the numbers do not
depend on how rows are split.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_kl, token_nll, vocabulary_loss
from trace_jax.models.moe import router_probabilities
from trace_jax.parallel.mesh import BATCH_AXES, as_varying, varying_axes
from trace_jax.routing.calibration import Calibration, token_weights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.rivals import anchor_loss, target_experts
from trace_jax.unlearning.state import StepSettings
from trace_jax.unlearning.terms import ForgetInputs, Objective, hidden_distance
from trace_jax.unlearning.trained import Flat, current_params


class Constants(NamedTuple):
    """Arrays that a run never changes.

    original: all parameters of the model before unlearning, by path. index i32 [L, N]: the experts that train, where a
    few do. masks: of updates (`trace_jax.unlearning.trainable.update_masks`).
    numbers: coefficients and numbers of the objective, f32 [] by name. target f32 [topics, D]: where RMU steers.
    online: what retain tokens are weighed with by their present routing; None: their weights come with the rows.
    protection: `trace_jax.unlearning.rivals.Protection` of the routers.
    """

    original: Flat
    index: Any
    masks: Flat | None
    numbers: Flat
    target: jax.Array | None = None
    online: Calibration | None = None
    protection: Any = None


def coefficients(config: UnlearningConfig) -> Flat:
    """The traced numbers of a run (`Constants.numbers`)."""
    numbers = config.objective.numbers() | ({"alpha": config.alpha} if config.retains else {})
    if config.anchor:
        numbers["anchor"] = config.anchor
    if config.lora is not None:
        numbers["lora_scale"] = config.lora.alpha / config.lora.rank
    return {name: jnp.float32(value) for name, value in numbers.items()}


def targets(tokens: jax.Array) -> jax.Array:
    """Token t+1 at position t; the last position's target is never valid."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)


def share(total: jax.Array, count: jax.Array) -> jax.Array:
    """The sum over all devices, over the whole batch's count."""
    return jax.lax.psum(total, BATCH_AXES) / jnp.maximum(count, 1.0)


class _Outputs(NamedTuple):
    """What a forward pass gave for the rows of one part of a step; None for what wasn't asked for."""

    final: Any = None  # [B, S, D], before the output head
    inner: Any = None  # [B, S, D], of the layer that RMU steers or `hidden` compares
    indices: Any = None  # [L, B, S, K], the chosen experts
    logits: Any = None  # f32 [L, B, S, E], raw scores of the routers


def _forward(
    params, settings: StepSettings, parts: dict[str, Batch], *, full: bool, inner: bool, routers: tuple[str, ...] = ()
) -> tuple[dict[str, _Outputs], Any]:
    """One forward pass over the rows of all parts: (outputs by part, choices of experts without room i32 [] or 0).

    Unless `full`, nothing above the layer that is steered or compared is computed.
    """
    if not parts:
        return {}, 0
    parallel, layer = settings.parallel, settings.layer
    tokens, segments = (jnp.concatenate([getattr(b, f) for b in parts.values()]) for f in ("tokens", "segments"))
    layers, dropped = ("layers",) if full and inner else (), ("dropped",) if parallel.expert_buffer else ()
    out: Any = forward(
        params, settings.model, tokens, mask=segments, collect=("hidden", *layers, *dropped, *routers),
        num_layers=None if full else layer, remat=parallel.remat, expert_buffer=parallel.expert_buffer,
    )  # fmt: skip
    middle = None if not inner else out.layers[layer - 1] if full else out.hidden
    ends = np.cumsum([len(b.tokens) for b in parts.values()])[:-1]

    def split(x, axis):
        return [None] * len(parts) if x is None else jnp.split(x, ends, axis)

    found = zip(
        split(out.hidden if full else None, 0), split(middle, 0), split(out.router.indices, 1),
        split(out.router.logits, 1), strict=True,
    )  # fmt: skip
    by_part = {name: _Outputs(*outputs) for name, outputs in zip(parts, found, strict=True)}
    return by_part, out.router.dropped.sum() if dropped else 0


class _Passes(NamedTuple):
    """What both models gave for the parts of a step, "forget", "refusals" and "retain"; both nested parameters."""

    current: Any
    original: Any
    parts: dict[str, Batch]
    seen: dict[str, _Outputs]
    reference: dict[str, _Outputs]  # of the parts that are compared with the original model


def _passes(trainable: Flat, constants: Constants, rows: StepRows, settings: StepSettings) -> tuple[_Passes, Any]:
    """The forward passes that the losses need, and no more; and the choices of experts without room."""
    assert settings.objective is not None
    numbers, original = constants.numbers, unflatten(constants.original)
    scale = numbers.get("lora_scale")
    current = unflatten(current_params(trainable, constants.original, constants.index, scale))
    named = {"forget": rows.forget, "refusals": rows.refusals, "retain": rows.retain}
    parts = {name: batch for name, batch in named.items() if batch is not None}
    needs, retain_loss = settings.objective.needs, settings.retain_loss
    compared = {
        "forget": "reference_logits" in needs or ("reference_nll" in needs and rows.reference_nll is None),
        "refusals": "reference_refusals" in needs and rows.refusal_reference_nll is None,
        "retain": retain_loss == "kl",
    }
    compared = {name: parts[name] for name, wanted in compared.items() if wanted}
    reference, before = _forward(original, settings, compared, full=True, inner=False)
    if retain_loss == "hidden":
        hidden, dropped = _forward(original, settings, {"retain": parts["retain"]}, full=False, inner=True)
        reference, before = reference | hidden, before + dropped
    # RMU with its own retain term computes no more than the layer it steers; online weights and anchors look at all.
    steers, anchored, online = "hidden" in needs, "anchor" in numbers, constants.online is not None
    seen, dropped = _forward(
        current, settings, parts, inner=steers or retain_loss == "hidden",
        full=online or anchored or not (steers and retain_loss in ("", "hidden")),
        routers=("router_logits", "indices") if anchored else ("indices",) if online else (),
    )  # fmt: skip
    return _Passes(current, original, parts, seen, reference), before + dropped


def _nll(params: Any, outputs: _Outputs, batch: Batch, settings: StepSettings) -> jax.Array:
    return token_nll(params, settings.model, outputs.final, targets(batch.tokens))


def _forget_inputs(p: _Passes, rows: StepRows, constants: Constants, settings: StepSettings) -> ForgetInputs:
    """What the objective looks at."""
    objective = settings.objective
    assert objective is not None
    needs, found, forget = objective.needs, {}, p.seen["forget"]
    if "nll" in needs:
        found["nll"] = _nll(p.current, forget, rows.forget, settings)
    if "reference_nll" in needs:
        found["reference_nll"] = rows.reference_nll
        if rows.reference_nll is None:
            found["reference_nll"] = _nll(p.original, p.reference["forget"], rows.forget, settings)
    if "refusals" in needs:
        refusals = p.parts["refusals"]
        found["refusal_valid"] = refusals.valid
        found["refusal_nll"] = _nll(p.current, p.seen["refusals"], refusals, settings)
    if "reference_refusals" in needs:
        found["refusal_reference_nll"] = rows.refusal_reference_nll
        if rows.refusal_reference_nll is None:
            found["refusal_reference_nll"] = _nll(p.original, p.reference["refusals"], p.parts["refusals"], settings)
    if "hidden" in needs:
        assert constants.target is not None
        found["hidden"], found["target"] = forget.inner, constants.target[rows.topic]
    if "logits" in needs:

        def of_logits(own, reference, numbers):
            return objective.with_numbers(numbers).vocabulary(own, reference)

        compared = "reference_logits" in needs
        found["vocabulary"] = vocabulary_loss(
            of_logits, constants.numbers, p.current, settings.model, forget.final, targets(rows.forget.tokens),
            params_ref=p.original if compared else None,
            hidden_ref=p.reference["forget"].final if compared else None,
        )  # fmt: skip
    return ForgetInputs(rows.forget.valid, **found)


def _retain_losses(p: _Passes, settings: StepSettings) -> jax.Array:
    """f32 [B, S]: the loss of every retain token."""
    seen, retain = p.seen["retain"], p.parts["retain"]
    if settings.retain_loss == "nll":
        return _nll(p.current, seen, retain, settings)
    if settings.retain_loss == "kl":
        return token_kl(p.original, p.reference["retain"].final, p.current, seen.final, settings.model)
    return hidden_distance(seen.inner, p.reference["retain"].inner)


def _sums(
    trainable: Flat, constants: Constants, objective: Objective, rows: StepRows, settings: StepSettings
) -> tuple[dict[str, jax.Array], Any]:
    """Over this device's rows: (sums of the losses and of online weights, by name; choices of experts without room)."""
    p, dropped = _passes(trainable, constants, rows, settings)
    values = objective.loss(_forget_inputs(p, rows, constants, settings))
    sums = {"forget": jnp.where(_counts(objective, rows) > 0, values, 0.0).sum()}
    if rows.retain is not None:
        valid, weights = rows.retain.valid, rows.weights
        if constants.online is not None:
            weights = token_weights(p.seen["retain"].indices, constants.online, mask=valid) * weights
            sums["weights"] = weights.sum()
        weighted = jax.lax.stop_gradient(weights) * _retain_losses(p, settings)
        sums["retain"] = jnp.where(valid, weighted, 0.0).sum()
    if "anchor" in constants.numbers:
        assert constants.index is not None
        forget, target = p.seen["forget"], target_experts(constants.index, settings.model.num_experts)
        probabilities = router_probabilities(forget.logits, settings.model)
        sums["anchor"] = anchor_loss(
            probabilities, forget.indices, target, rows.forget.valid, form=settings.anchor_form
        )[0]
    return sums, dropped


def _counts(objective: Objective, rows: StepRows) -> jax.Array:
    counts = objective.counts(rows.forget.valid, None if rows.refusals is None else rows.refusals.valid)
    return counts.astype(jnp.float32)


def gradient(
    trainable: Flat, alpha: jax.Array | None, constants: Constants, rows: StepRows, settings: StepSettings
) -> tuple[Flat, dict]:
    """(gradient of the loss over the whole batch, metrics), from this device's rows, one microbatch after another.

    L_retain is divided by the number of valid positions and not by the sum of weights, which have mean one over the
    corpus: so its expectation is exactly the reweighted loss at any batch size (`normalize` "batch" does otherwise).

    Args:
      alpha: the coefficient of the retain loss where it changes; None: that of `constants`.
    """
    assert settings.objective is not None
    numbers, objective = constants.numbers, settings.objective.with_numbers(constants.numbers)
    counts = {"forget": _counts(objective, rows), "anchor": rows.forget.valid}
    if rows.retain is not None:
        valid = rows.retain.valid
        counts["retain"] = jnp.where(valid, rows.weights, 0.0) if settings.normalize == "batch" else valid
    counts = {name: jax.lax.psum(count.astype(jnp.float32).sum(), BATCH_AXES) for name, count in counts.items()}
    factors = {"forget": numbers["gamma"], "retain": numbers.get("alpha") if alpha is None else alpha}
    factors["anchor"] = numbers.get("anchor")

    def loss(trainable, part):
        sums, dropped = _sums(trainable, constants, objective, part, settings)
        means = {name: share(sums[name], counts[name]) for name in factors if name in sums}
        total = sum((factors[name] * mean for name, mean in means.items()), start=jnp.float32(0.0))
        metrics = {"loss": total} | {f"{name}_loss": mean for name, mean in means.items()}
        if "weights" in sums:
            metrics["weight_mean"] = share(sums["weights"], counts["retain"])
        if settings.parallel.expert_buffer:
            metrics["dropped"] = jax.lax.psum(as_varying(jnp.float32(dropped), frozenset(BATCH_AXES)), BATCH_AXES)
        return total, metrics

    of_part, number = jax.grad(loss, has_aux=True), settings.parallel.microbatches
    if number == 1:
        return of_part(trainable, rows)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(trainable, part)), None

    parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), rows)
    shapes = jax.eval_shape(of_part, trainable, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zeros = ({path: as_varying(zero, varying_axes(trainable[path])) for path, zero in zeros[0].items()}, zeros[1])
    return jax.lax.scan(add, zeros, parts)[0]
