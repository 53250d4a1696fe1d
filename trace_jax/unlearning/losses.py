"""What a device computes from its rows: forward passes of both models, forget and retain losses, their gradient.

Every loss is a sum that is added over devices and divided by a count of the whole batch, so that the numbers do not
depend on how rows are split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_kl, token_nll, vocabulary_loss
from trace_jax.models.moe import router_probabilities
from trace_jax.parallel.mesh import BATCH_AXES, as_varying, varying_axes
from trace_jax.routing.calibration import Calibration, online_loss_weights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.objectives import OBJECTIVES, ForgetInputs, Objective
from trace_jax.unlearning.retain import hidden_distance, weighted_retain
from trace_jax.unlearning.seuf import anchor_loss, target_experts
from trace_jax.unlearning.state import StepSettings
from trace_jax.unlearning.trained import Flat, current_params


class Constants(NamedTuple):
    """Arrays that a run never changes.

    original: all parameters of the model before unlearning, by path. index i32 [L, N]: the experts that train, where a
    few do. masks: of updates (`trace_jax.unlearning.trainable.update_masks`).
    numbers: coefficients and numbers of the objective, f32 [] by name. target f32 [topics, D]: where RMU steers.
    online: what retain tokens are weighed with by their present routing; None: their weights come with the rows.
    protection: `trace_jax.unlearning.grip.Protection` of the routers.
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
    names = ("gamma", *(("alpha",) if config.retains else ()), *OBJECTIVES[config.objective].numbers)
    names += ("retain_bound", "dual_warmup") if config.row.dual else ()
    names += ("anchor",) if config.anchor else ()
    numbers = {name: jnp.float32(getattr(config, name)) for name in names}
    if config.lora_rank is not None:
        numbers["lora_scale"] = jnp.float32((config.lora_alpha or 0.0) / config.lora_rank)
    return numbers


def targets(tokens: jax.Array) -> jax.Array:
    """Token t+1 at position t; the last position's target is never valid."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)


def share(total: jax.Array, count: jax.Array) -> jax.Array:
    """The sum over all devices, over the whole batch's count."""
    return jax.lax.psum(total, BATCH_AXES) / jnp.maximum(count, 1.0)


def _row(settings: StepSettings) -> Objective:
    return OBJECTIVES[settings.objective].form(settings.form or "")


def _retains(settings: StepSettings) -> bool:
    return settings.retain_loss not in (None, "none")


class _Seen(NamedTuple):
    """What a forward pass gave for some rows; None for what wasn't asked for."""

    final: Any = None  # [B, S, D], before the output head
    middle: Any = None  # [B, S, D], of the layer that RMU and `hidden` look at
    indices: Any = None  # [L, B, S, K], the chosen experts
    logits: Any = None  # f32 [L, B, S, E], raw scores of the routers


def _together(batches: list[Batch]) -> Batch:
    return batches[0] if len(batches) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *batches)


def _look(
    params, settings: StepSettings, batches: list[Batch], *, whole: bool, inside: bool, routers: tuple[str, ...] = ()
) -> tuple[list[_Seen], Any]:
    """One forward pass over several batches: (what each gave, choices of experts without room i32 [] or 0).

    Unless `whole`, nothing above the layer that is looked at is computed.
    """
    if not batches:
        return [], 0
    parallel, batch = settings.parallel, _together(batches)
    layers, dropped = ("layers",) if whole and inside else (), ("dropped",) if parallel.expert_buffer else ()
    out: Any = forward(
        params, settings.model, batch.tokens, mask=batch.segments, collect=("hidden", *layers, *dropped, *routers),
        num_layers=None if whole else settings.layer, remat=parallel.remat, expert_buffer=parallel.expert_buffer,
    )  # fmt: skip
    lost = out.router.dropped.sum() if dropped else 0
    middle = None if not inside else out.hidden if not whole else out.layers[(settings.layer or 1) - 1]
    seen, start = [], 0
    for size in (len(b.tokens) for b in batches):
        of_batch = [None if x is None else x[start : start + size] for x in (out.hidden if whole else None, middle)]
        parts = (None if x is None else x[:, start : start + size] for x in (out.router.indices, out.router.logits))
        seen.append(_Seen(*of_batch, *parts))
        start += size
    return seen, lost


def _original(params, rows: StepRows, settings: StepSettings) -> tuple[_Seen, _Seen, _Seen, Any]:
    """What the original model gives: (forget rows, refusals, retain rows, dropped), for what is needed of each."""
    row, parts = _row(settings), {}
    if row.against or ("reference_nll" in row.needs and rows.reference_nll is None):
        parts["forget"] = rows.forget
    if "refusals_reference" in row.needs and rows.refusal_reference_nll is None:
        parts["refusals"] = rows.refusals
    if settings.retain_loss == "kl":
        parts["retain"] = rows.retain
    seen, dropped = _look(params, settings, list(parts.values()), whole=True, inside=False)
    seen = dict(zip(parts, seen, strict=True))
    if settings.retain_loss == "hidden":
        inside, lost = _look(params, settings, [_given(rows.retain)], whole=False, inside=True)
        seen["retain"], dropped = inside[0], dropped + lost
    forget, refusals, retain = (seen.get(name, _Seen()) for name in ("forget", "refusals", "retain"))
    return forget, refusals, retain, dropped


def _given(batch: Batch | None) -> Batch:
    assert batch is not None
    return batch


class _Sums(NamedTuple):
    """What a device adds up; None for a term that there isn't."""

    forget: jax.Array
    retain: Any = None  # weighted retain losses
    weights: Any = None  # online weights
    anchor: Any = None
    dropped: Any = 0  # choices of experts without room


class _Models(NamedTuple):
    """Parameters of the model that trains and of the original one, nested."""

    current: Any
    original: Any


def _losses(trainable: Flat, constants: Constants, rows: StepRows, settings: StepSettings) -> _Sums:
    """Sums over this device's rows."""
    row, retains, anchored = _row(settings), _retains(settings), settings.anchor_form is not None
    scale = constants.numbers.get("lora_scale")
    current = current_params(trainable, constants.original, constants.index, scale)
    models = _Models(unflatten(current), unflatten(constants.original))
    forget_ref, refusals_ref, retain_ref, dropped_before = _original(models.original, rows, settings)
    parts = {"forget": rows.forget}
    if "refusals" in row.needs:
        parts["refusals"] = _given(rows.refusals)
    if retains:
        parts["retain"] = _given(rows.retain)
    # RMU with its own retain term looks at no more than the layer it steers; online weights and anchors look at all.
    steers, online = "hidden" in row.needs, constants.online if retains else None
    inside = steers or settings.retain_loss == "hidden"
    whole = online is not None or anchored or not (steers and settings.retain_loss in ("none", "hidden"))
    routers = ("router_logits", "indices") if anchored else ("indices",) if online is not None else ()
    found, dropped = _look(models.current, settings, list(parts.values()), whole=whole, inside=inside, routers=routers)
    seen = dict(zip(parts, found, strict=True))

    inputs = _forget_inputs(models, seen, forget_ref, refusals_ref, rows, constants, settings)
    sums = _Sums(row.loss(inputs, constants.numbers)[0], dropped=dropped + dropped_before)
    if anchored:
        sums = sums._replace(anchor=_anchor(seen["forget"], rows.forget.valid, constants.index, settings))
    if not retains:
        return sums
    valid, weights = _given(rows.retain).valid, rows.weights
    if online is not None:
        weights = online_loss_weights(online, seen["retain"].indices, valid, weights)
        sums = sums._replace(weights=weights.sum())
    per_token = _retain_losses(models, seen["retain"], retain_ref, _given(rows.retain), settings)
    return sums._replace(retain=weighted_retain(per_token, weights, valid)[0])


def _nll(params: Any, final: jax.Array, batch: Batch, settings: StepSettings) -> jax.Array:
    return token_nll(params, settings.model, final, targets(batch.tokens))


def _forget_inputs(
    models: _Models,
    seen: dict[str, _Seen],
    forget_ref: _Seen,
    refusals_ref: _Seen,
    rows: StepRows,
    constants: Constants,
    settings: StepSettings,
) -> ForgetInputs:
    """What the objective looks at, and no more."""
    row, forget, parts = _row(settings), rows.forget, {}
    if "nll" in row.needs:
        parts["nll"] = _nll(models.current, seen["forget"].final, forget, settings)
    if "reference_nll" in row.needs:
        known = rows.reference_nll
        parts["reference_nll"] = _nll(models.original, forget_ref.final, forget, settings) if known is None else known
    if "refusals" in row.needs:
        refusals = _given(rows.refusals)
        parts["refusal_valid"] = refusals.valid
        parts["refusal_nll"] = _nll(models.current, seen["refusals"].final, refusals, settings)
    if "refusals_reference" in row.needs:
        known = rows.refusal_reference_nll
        parts["refusal_reference_nll"] = (
            _nll(models.original, refusals_ref.final, _given(rows.refusals), settings) if known is None else known
        )
    if "hidden" in row.needs:
        assert constants.target is not None
        parts["hidden"], parts["target"] = seen["forget"].middle, constants.target[rows.topic]
    if row.vocabulary is not None:
        against = {"params_ref": models.original, "hidden_ref": forget_ref.final} if row.against else {}
        given = models.current, settings.model, seen["forget"].final, targets(forget.tokens)
        parts["vocabulary"] = vocabulary_loss(row.vocabulary, constants.numbers, *given, **against)
    return ForgetInputs(forget.valid, **parts)


def _retain_losses(models: _Models, seen: _Seen, reference: _Seen, retain: Batch, settings: StepSettings) -> jax.Array:
    """f32 [B, S]: the loss of every retain token."""
    if settings.retain_loss == "nll":
        return _nll(models.current, seen.final, retain, settings)
    if settings.retain_loss == "kl":
        return token_kl(models.original, reference.final, models.current, seen.final, settings.model)
    return hidden_distance(seen.middle, reference.middle)


def _anchor(seen: _Seen, valid: jax.Array, index: jax.Array | None, settings: StepSettings) -> jax.Array:
    """Sum of SEUF's anchor losses over the forget rows."""
    assert index is not None
    probabilities = router_probabilities(seen.logits, settings.model)
    target = target_experts(index, settings.model.num_experts)
    return anchor_loss(probabilities, seen.indices, target, valid, form=settings.anchor_form or "sum")[0]


def _forget_count(rows: StepRows, settings: StepSettings, constants: Constants) -> jax.Array:
    """What the sum of forget losses is divided by: of tokens or rows, it does not depend on what the model says."""
    zeros = jnp.zeros(rows.forget.valid.shape, jnp.float32)
    refused = None if rows.refusals is None else rows.refusals.valid
    none = None if refused is None else jnp.zeros(refused.shape, jnp.float32)
    inputs = ForgetInputs(
        rows.forget.valid, zeros, zeros, zeros[..., None], zeros[:, :1], zeros, refused, none, none
    )  # fmt: skip
    return _row(settings).loss(inputs, constants.numbers)[1]


def _retain_count(rows: StepRows, settings: StepSettings) -> jax.Array:
    """What the sum of weighted retain losses is divided by."""
    retain = _given(rows.retain)
    if settings.normalize == "batch":
        return jnp.where(retain.valid, rows.weights, 0.0).sum()
    return retain.valid.sum(dtype=jnp.float32)


def gradient(
    trainable: Flat, alpha: jax.Array | None, constants: Constants, rows: StepRows, settings: StepSettings
) -> tuple[Flat, dict]:
    """(gradient of the loss over the whole batch, metrics), from this device's rows, one microbatch after another.

    alpha: the coefficient of the retain loss where it changes; None: that of `constants`.
    """
    n = constants.numbers
    forget_count = jax.lax.psum(_forget_count(rows, settings, constants), BATCH_AXES)
    forget_tokens = jax.lax.psum(rows.forget.valid.sum(dtype=jnp.float32), BATCH_AXES)
    retain_count = jax.lax.psum(_retain_count(rows, settings), BATCH_AXES) if _retains(settings) else None

    def loss(trainable, part):
        sums = _losses(trainable, constants, part, settings)
        metrics = {"forget_loss": share(sums.forget, forget_count)}
        total = n["gamma"] * metrics["forget_loss"]
        if sums.retain is not None:
            assert retain_count is not None
            metrics["retain_loss"] = share(sums.retain, retain_count)
            total = total + (n["alpha"] if alpha is None else alpha) * metrics["retain_loss"]
            if sums.weights is not None:
                metrics["weight_mean"] = share(sums.weights, retain_count)
        if sums.anchor is not None:
            metrics["anchor_loss"] = share(sums.anchor, forget_tokens)
            total = total + n["anchor"] * metrics["anchor_loss"]
        if settings.parallel.expert_buffer:
            metrics["dropped"] = jax.lax.psum(as_varying(jnp.float32(sums.dropped), frozenset(BATCH_AXES)), BATCH_AXES)
        return total, {"loss": total, **metrics}

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
