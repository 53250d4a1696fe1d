"""What a device computes from its rows: forward passes of both models, forget and retain losses, their gradient. A loss
is a sum over all devices, divided by a count of the whole batch: numbers do not depend on how rows are split.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import ModelConfig, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_kl, token_nll, vocabulary_loss
from trace_jax.models.moe import router_probabilities
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, as_varying, varying_axes
from trace_jax.routing.calibration import Calibration, token_weights
from trace_jax.unlearning.config import Lora, UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.objective import ForgetInputs, Objective
from trace_jax.unlearning.optimizer import OptimizerConfig
from trace_jax.unlearning.trainable import Flat, current_params


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Everything that shapes the compiled step; two runs that share it share one compilation."""

    model: ModelConfig
    optimizer: OptimizerConfig
    steps: int
    objective: Objective = dataclasses.field(default_factory=Objective)  # without numbers; that of training is unused
    retain_loss: str = "none"
    normalize: str = "count"
    layer: int = 0  # whose output a loss looks at, from 1
    parallel: ParallelConfig = PLAIN
    anchor_form: str = "sum"


class Constants(NamedTuple):
    """Arrays that a run never changes."""

    original: Flat  # all parameters of the model before unlearning, by path
    index: Any  # i32 [L, N], the experts that train, where a few do
    masks: Flat | None  # of updates (`trace_jax.unlearning.trainable.update_masks`)
    numbers: Flat  # coefficients and numbers of the objective, f32 [] by name
    target: Any = None  # f32 [topics, D], where RMU steers
    online: Calibration | None = None  # weighs retain tokens by their present routing, beside the weights of their rows
    protection: Any = None  # `trace_jax.unlearning.grip.Protection` of the routers
    direction: Flat | None = None  # the gradient of every step, where one was made before (repselect)


def coefficients(config: UnlearningConfig) -> Flat:
    """The traced numbers of a run (`Constants.numbers`)."""
    numbers = config.objective.numbers() | ({"alpha": config.alpha} if config.retains else {})
    if config.trainable.anchor:
        numbers["anchor"] = config.trainable.anchor
    if isinstance(config.trainable, Lora):
        numbers["lora_scale"] = config.trainable.alpha / config.trainable.rank
    return {name: jnp.float32(value) for name, value in numbers.items()}


def share(total: jax.Array, count: jax.Array) -> jax.Array:
    """The sum over all devices, over the whole batch's count."""
    return jax.lax.psum(total, BATCH_AXES) / jnp.maximum(count, 1.0)


class _Output(NamedTuple):
    """What a model's forward pass gave for the rows of one part of a step; None for what wasn't asked for."""

    params: Any
    config: ModelConfig
    tokens: jax.Array
    final: Any  # [B, S, D], before the output head
    inner: Any  # [B, S, D], of the layer that RMU steers or `hidden` compares
    indices: Any  # [L, B, S, K], the chosen experts
    logits: Any  # f32 [L, B, S, E], raw scores of the routers

    def nll(self) -> jax.Array:
        """f32 [B, S], -log p of the next token."""
        return token_nll(self.params, self.config, self.final, jnp.roll(self.tokens, -1, axis=1))


def _forward(
    params, settings: StepSettings, batches: dict[str, Batch], *, full: bool = True, inner: bool = False,
    routers: tuple[str, ...] = (),
) -> tuple[dict[str, _Output], Any]:  # fmt: skip
    """(What one pass over the rows of all parts gave, by part; choices of experts without room). Unless `full`, nothing
    above the steered or compared layer is computed.
    """
    if not batches:
        return {}, 0
    parallel, layer = settings.parallel, settings.layer
    tokens, segments = (jnp.concatenate([getattr(b, f) for b in batches.values()]) for f in ("tokens", "segments"))
    layers, dropped = ("layers",) if full and inner else (), ("dropped",) if parallel.expert_buffer else ()
    out: Any = forward(
        params, settings.model, tokens, mask=segments, collect=("hidden", *layers, *dropped, *routers),
        num_layers=None if full else layer, remat=parallel.remat, expert_buffer=parallel.expert_buffer,
    )  # fmt: skip
    middle = None if not inner else out.layers[layer - 1] if full else out.hidden
    of_rows, of_layers = (out.hidden if full else None, middle), (out.router.indices, out.router.logits)
    outputs, end = {}, 0
    for name, batch in batches.items():
        part = slice(end, end := end + len(batch.tokens))
        pieces = jax.tree.map(lambda x, p=part: x[p], of_rows), jax.tree.map(lambda x, p=part: x[:, p], of_layers)
        outputs[name] = _Output(params, settings.model, batch.tokens, *pieces[0], *pieces[1])
    return outputs, out.router.dropped.sum() if dropped else 0


def _forget_inputs(
    current: dict[str, _Output], reference: dict[str, _Output], rows: StepRows, constants: Constants,
    settings: StepSettings,
) -> ForgetInputs:  # fmt: skip
    """What the objective looks at."""
    forget, needs, read = current["forget"], settings.objective.needs, {}
    if "nll" in needs:
        read["nll"] = forget.nll()
    if "refusal_nll" in needs and rows.refusals is not None:
        read["refusal_nll"] = current["refusals"].nll()
    for name, part in (("reference_nll", "forget"), ("refusal_reference_nll", "refusals")):
        if name in needs:
            computed_before = getattr(rows, name)
            read[name] = reference[part].nll() if computed_before is None else computed_before
    if "hidden" in needs:
        read |= {"hidden": forget.inner, "target": constants.target[rows.topic]}
    if "logits" in needs:
        before = reference.get("forget") if "reference_logits" in needs else None
        read["vocabulary"] = vocabulary_loss(
            lambda own, original, numbers: settings.objective.with_numbers(numbers).vocabulary(own, original),
            constants.numbers, forget.params, settings.model, forget.final, jnp.roll(forget.tokens, -1, axis=1),
            None if before is None else (before.params, before.final),
        )  # fmt: skip
    return _masks(rows)._replace(**read)


def _masks(rows: StepRows) -> ForgetInputs:
    """What the objective looks at before any model has read it."""
    of = {} if rows.refusals is None else {f"refusal_{n}": getattr(rows.refusals, n) for n in ("valid", "segments")}
    return ForgetInputs(rows.forget.valid, rows.forget.segments, **of)


def _retain_counts(rows: Batch, objective: Objective, settings: StepSettings) -> jax.Array:
    """f32 [B, S], how much each retain loss counts beside its weight: RMU's own as its forget loss does."""
    own = settings.retain_loss == "hidden" and "hidden" in objective.needs
    counts = objective.counts(ForgetInputs(rows.valid, rows.segments)) if own else rows.valid
    return counts.astype(jnp.float32)


def _sums(
    trainable: Flat, constants: Constants, objective: Objective, rows: StepRows, settings: StepSettings
) -> tuple[dict[str, jax.Array], Any]:
    """(Sums of the losses and of online weights over this device's rows, by name; choices of experts without room)."""
    numbers, needs, retain_loss = constants.numbers, objective.needs, settings.retain_loss
    named = {"forget": rows.forget, "refusals": rows.refusals, "retain": rows.retain}
    batches = {name: batch for name, batch in named.items() if batch is not None}
    compared = {
        "forget": "reference_logits" in needs or ("reference_nll" in needs and rows.reference_nll is None),
        "refusals": "refusal_reference_nll" in needs and rows.refusal_reference_nll is None,
        "retain": retain_loss == "kl",
    }
    original = unflatten(constants.original)
    parts = {name: batches[name] for name, wanted in compared.items() if wanted}
    reference, dropped = _forward(original, settings, parts)
    retained = {"retain": batches["retain"]} if retain_loss == "hidden" else {}
    inner, inner_dropped = _forward(original, settings, retained, full=False, inner=True)
    # RMU with its own retain term computes no more than the layer it steers; online weights and anchors look at all.
    steers, anchored, online = "hidden" in needs, "anchor" in numbers, constants.online is not None
    params = current_params(trainable, constants.original, constants.index, numbers.get("lora_scale"))
    current, current_dropped = _forward(
        unflatten(params), settings, batches, inner=steers or retain_loss == "hidden",
        full=online or anchored or not (steers and retain_loss in ("none", "hidden")),
        routers=("router_logits", "indices") if anchored else ("indices",) if online else (),
    )  # fmt: skip
    values = objective.loss(_forget_inputs(current, reference, rows, constants, settings))
    counts = objective.counts(_masks(rows)).astype(jnp.float32)
    sums = {"forget": jnp.where(counts > 0, values, 0.0).sum((-2, -1))}
    if rows.retain is not None:
        valid, weights, retain = rows.retain.valid, rows.weights, current["retain"]
        if constants.online is not None:
            own = token_weights(retain.indices, constants.online, mask=valid, segments=rows.retain.segments)
            weights = weights * own
            sums["weights"] = weights.sum()
        if retain_loss == "nll":
            losses = retain.nll()
        elif retain_loss == "kl":
            losses = token_kl(original, reference["retain"].final, retain.params, retain.final, settings.model)
        else:
            before = jax.lax.stop_gradient(inner["retain"].inner)
            losses = jnp.square(retain.inner.astype(jnp.float32) - before.astype(jnp.float32)).mean(-1)
        counts = _retain_counts(rows.retain, objective, settings)
        weights = jax.lax.stop_gradient(jnp.where(valid, weights, 1.0))  # of padding, where a form counts it
        sums["retain"] = jnp.where(counts > 0, counts * weights * losses, 0.0).sum()
    if anchored:
        forget, form = current["forget"], settings.anchor_form
        probabilities = router_probabilities(forget.logits, settings.model)
        sums["anchor"] = anchor_loss(probabilities, forget.indices, constants.index, rows.forget.valid, form=form)
    return sums, dropped + inner_dropped + current_dropped


def anchor_loss(
    probabilities: jax.Array, indices: jax.Array, index: jax.Array, valid: jax.Array, *, form: str
) -> jax.Array:
    """f32 [], the sum over valid tokens bool [B, S] and over the layers that have a target expert.

    SEUF (2411.18797) unlearns in a few experts that forget tokens are routed to (preset "seuf" of `trainable`); this
    keeps the tokens on them, so that the forget loss doesn't fall by routing elsewhere. With a = 1 for target experts,
    `index` i32 [L, N] (E stands for none), and 0 for others, by `form`:

    - "sum", the paper's equation 3: |g - a|^2 summed over experts; g is the probability of those chosen, else 0.
    - "mean", its released code: the mean over experts of (s - a)^2, s the probability of all experts, chosen or not.

    probabilities: f32 [L, B, S, E], of the router, not renormalised over the chosen experts, indices i32 [L, B, S, K].
    """
    one_hot = functools.partial(jax.nn.one_hot, num_classes=probabilities.shape[-1], dtype=bool)
    target = one_hot(index).any(axis=1)
    if form == "sum":
        probabilities = jnp.where(one_hot(indices).any(axis=-2), probabilities, 0.0)
    error = jnp.square(probabilities - target.astype(jnp.float32)[:, None, None, :])
    of_layer = error.mean(-1) if form == "mean" else error.sum(-1)
    return jnp.where(valid[None] & target.any(axis=-1)[:, None, None], of_layer, 0.0).sum()


def gradient(
    trainable: Flat, alpha: jax.Array | None, constants: Constants, rows: StepRows, settings: StepSettings
) -> tuple[Flat, dict]:
    """(gradient of the loss over the whole batch, metrics), from this device's rows, one microbatch after another.

    L_retain is divided by the number of valid positions and not by the sum of weights, which have mean one over the
    corpus: so its expectation is exactly the reweighted loss at any batch size (`normalize` "batch" does otherwise).
    Its coefficient is `alpha` where that changes, else that of `constants`.
    """
    numbers, number = constants.numbers, settings.parallel.microbatches
    objective = settings.objective.with_numbers(numbers)
    counts = {"anchor": rows.forget.valid, "forget": objective.counts(_masks(rows))}
    if rows.retain is not None:
        counts["retain"] = _retain_counts(rows.retain, objective, settings)
        if settings.normalize == "batch":
            counts["retain"] *= jnp.where(rows.retain.valid, rows.weights, 1.0)
    counts = {name: jax.lax.psum(count.astype(jnp.float32).sum(), BATCH_AXES) for name, count in counts.items()}
    retained = numbers.get("alpha") if alpha is None else alpha
    factors = {"forget": numbers["gamma"], "retain": retained, "anchor": numbers.get("anchor")}

    def loss(trainable, part):
        sums, dropped = _sums(trainable, constants, objective, part, settings)
        means = {name: share(sums[name], counts[name]) for name in factors if name in sums}
        means["forget"] = objective.of_means(means["forget"], number)
        total = sum((factors[name] * mean for name, mean in means.items()), start=jnp.float32(0.0))
        metrics = {"loss": total} | {f"{name}_loss": mean for name, mean in means.items()}
        if "weights" in sums:
            metrics["weight_mean"] = share(sums["weights"], counts["retain"])
        if settings.parallel.expert_buffer:
            metrics["dropped"] = jax.lax.psum(as_varying(jnp.float32(dropped), frozenset(BATCH_AXES)), BATCH_AXES)
        return total, metrics

    of_part = jax.grad(loss, has_aux=True)
    if number == 1:
        return of_part(trainable, rows)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(trainable, part)), None

    parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), rows)
    shapes = jax.eval_shape(of_part, trainable, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zeros = ({path: as_varying(zero, varying_axes(trainable[path])) for path, zero in zeros[0].items()}, zeros[1])
    return jax.lax.scan(add, zeros, parts)[0]
