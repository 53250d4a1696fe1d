"""Unlearning: from a model, forget rows and weighted retain rows to a model that has forgotten."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.refusals import encode_refusals, with_refusals
from trace_jax.data.rows import Rows
from trace_jax.files import as_path
from trace_jax.models.arrays import flatten, unflatten
from trace_jax.models.model import Model
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.config import PLAIN, ParallelConfig
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import ROWS
from trace_jax.progress import say
from trace_jax.routing.recalibration import Recalibration
from trace_jax.routing.retain_weights import RetainWeights
from trace_jax.unlearning.config import CHOOSING, STEERING, UnlearningConfig
from trace_jax.unlearning.grip import BIAS, ROUTER, check_router, keep_routers
from trace_jax.unlearning.inputs import Inputs, forget_sampler
from trace_jax.unlearning.length import batch_text, with_steps
from trace_jax.unlearning.loop import Loop
from trace_jax.unlearning.lora import factors
from trace_jax.unlearning.losses import Constants, coefficients
from trace_jax.unlearning.objectives import steering_directions
from trace_jax.unlearning.parameters import first_trainable, held_by_both, whole_params
from trace_jax.unlearning.recalibrated import Recalibrated
from trace_jax.unlearning.reference import cached_reference, mean_lengths
from trace_jax.unlearning.router_passes import realign, retain_protection, with_realigned
from trace_jax.unlearning.selected import selected_index
from trace_jax.unlearning.state import initial_state, unlearning_settings
from trace_jax.unlearning.step import row_multiple, unlearning_step
from trace_jax.unlearning.trainable import partition, table_text, trainable_table, update_masks


@dataclasses.dataclass(frozen=True)
class Unlearned:
    """The outcome of unlearning.

    Attributes:
      model: the model after unlearning; step: how many steps it is away from the target model.
      steps: how many the run was to take.
      stopped: why the run ended before that, or "". failed: whether by an error, not by a rule that was asked for.
      trained: table of what trained (`trainable_table`).
      grip: what was protected in each layer, or how its router was realigned (`trace_jax.unlearning.router_passes`).
    """

    model: Model
    step: int
    steps: int
    stopped: str
    failed: bool
    trained: list[dict]
    seconds_per_step: float
    grip: list[dict] | None = None


def unlearn(
    model: Model,
    forget: Rows,
    retain: Rows | None,
    *,
    config: UnlearningConfig,
    weights: RetainWeights | None = None,
    selected: np.ndarray | None = None,
    recalibrate: Recalibration | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    parallel: ParallelConfig = PLAIN,
    directory: str | os.PathLike | None = None,
    identity: str | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    title: str = "unlearning",
) -> Unlearned:
    """Unlearns `forget` from `model` while holding on to `retain`.

    Args:
      model: the target model; it is not changed, and its frozen parameters are shared with the result.
      forget, retain: packed rows. `forget.domain` numbers the topics to forget. `retain` may be None for objectives
        without a retain term.
      weights: of retain tokens, and how often each row is drawn (`trace_jax.routing`); None = uniform.
      selected: bool [L, E], the experts that train when `config.trainable` is "selected_experts" or "seuf"
        (`trace_jax.unlearning.selected.chosen_experts`); default: those of `weights` where `config.experts` is
        "calibration". Recalibration does not change them.
      recalibrate: solves `weights` anew every few steps, under the model as it is then; they are kept in `directory`.
      seed: of batch order, of RMU's directions and of low-rank factors.
      mesh, parallel: the devices, and how the step is laid out on them; no mesh: one as `parallel` says.
      directory: where metrics.jsonl and resumable state go; None keeps nothing.
      identity: hash of everything that made this run; state of another one in `directory` is not continued.
      evaluate: called with parameters at step 0, every `config.evaluate_every` steps and at the end. What it returns
        (JSON) goes into metrics.jsonl; rules about when to stop and what to keep need an `Evaluated`.
    Returns:
      `Unlearned`; after a NaN, the last good state and the reason.
    Raises:
      ConfigError: retain data missing for an objective that needs it; a layer the model doesn't have; selected
        experts missing; refusals without a tokenizer; a rule without an evaluation to read; online weights that a
        batch would have to be divided by; recalibration without weights to start from; routers that GRIP can't hold.
    """
    if selected is None and weights is not None and config.experts == "calibration":
        selected = weights.selected
    selected = selected if config.trainable in CHOOSING else None
    _check(model, forget, retain, config, selected)
    if config.rules.asks and evaluate is None:
        raise ConfigError(
            "stop_forgetting, stop_utility and keep are about evaluations, and there are none; give `evaluate`, or "
            "leave them out."
        )
    _check_weights(config, weights, recalibrate)
    mesh = mesh or parallel.mesh()
    config = with_steps(config, forget, retain)
    assert config.steps is not None
    say(f"{title}: {batch_text(config, forget, retain, mesh, parallel.microbatches)}")
    trainable, specs = config.trainable or "all", param_specs(model.config, mesh)
    training, frozen = (
        place(part, mesh, {path: specs[path] for path in part}) for part in partition(model.params, trainable)
    )
    if config.grip == "project":
        check_router(model.config, training)
    rank, model_layers = config.lora_rank, trained_layers(config)
    masks = place(update_masks(training, model.config, layers=model_layers, selected=selected), mesh)
    own = None if rank is None else factors(model.config, training, rank)
    trained = trainable_table(model.params, trainable, masks, selected, own)
    say(table_text(trained))
    settings, everything = unlearning_settings(config, model.config, parallel), {**frozen, **training}
    identity, refusals = identity or fingerprint(config, model.config, seed), None
    if "refusals" in config.row.needs:
        encoded = encode_refusals(config.refusals or (), model.tokenizer, model.special)
        forget, refusals = with_refusals(forget, encoded, pad=model.special.pad)
    numbers, target = place((coefficients(config), _target(model, forget, config, seed, mesh)), mesh)
    index = None if selected is None else place(selected_index(selected), mesh)
    frozen, reference = held_by_both(training, frozen, index, rank)
    online = place(weights.online, mesh) if weights is not None and config.retains else None
    original = model.replace(params=unflatten(everything))
    protection, table = None, None
    if config.grip == "project":
        assert retain is not None
        protection, table = retain_protection(original, retain, config, bias=BIAS in training, seed=seed, mesh=mesh)
    constants = Constants(frozen, reference, index, masks, numbers, target, online=online, protection=protection)

    def step(state, placed):
        return unlearning_step(state, constants, placed, settings=settings, mesh=mesh)

    def start():
        alpha = config.alpha if config.row.dual else None
        first = first_trainable(training, index, model.config, mesh, rank=rank, seed=seed)
        return initial_state(first, settings, mesh, masks, alpha)

    keep = jax.jit(functools.partial(keep_routers, mesh=mesh))

    scale = numbers.get("lora_scale")

    def whole(trainable):
        negated = (config.task_scale or 0.0) if config.row.negates else 0.0
        params = whole_params(trainable, everything, index, model.config, mesh, scale=scale, negated=negated)
        if protection is None or not negated:
            return params
        # The margins held for what was learnt; now they must for what that was subtracted from.
        flat = flatten(params)
        routers = {path: flat[path] for path in (ROUTER, BIAS) if path in flat}
        return unflatten({**flat, **keep(routers, reference, protection, place(np.int32(0), mesh))[0]})

    def finished(trainable):
        """(what a run that ends here gives, rows about what GRIP did)."""
        unlearned = model.replace(params=whole(trainable))
        if config.grip != "realign":
            return unlearned, table
        assert retain is not None and config.grip_tokens is not None and config.grip_ridge is not None
        return realign(original, unlearned, retain, tokens=config.grip_tokens, ridge=config.grip_ridge, mesh=mesh)

    with tempfile.TemporaryDirectory() as scratch:
        where, known = as_path(directory or scratch), None
        if config.cache_reference:
            size = row_multiple(settings, mesh) * config.forget_batch_size
            known = cached_reference(where, identity, model, forget, refusals, mesh=mesh, batch_size=size)
        batches = Inputs(
            forget, retain, weights, config,
            seed=seed, multiple=row_multiple(settings, mesh), refusals=refusals, reference=known,
        )  # fmt: skip
        recalibrated = None
        if recalibrate is not None and weights is not None and config.retains:
            recalibrated = Recalibrated(
                recalibrate, weights, batches.weigh, directory=where, identity=identity, title=title
            )

        def refresh(step, trainable):
            assert recalibrated is not None
            params = whole_params(trainable, everything, index, model.config, mesh, scale=scale)
            recalibrated.refresh(step, model.replace(params=params))

        loop = Loop(
            where,
            identity,
            config.steps,
            config.checkpoint_every,
            title,
            (lambda trainable: evaluate(finished(trainable)[0].params)) if evaluate else None,
            config.evaluate_every,
            seed,
            rules=config.rules,
            refresh_every=recalibrate.every if recalibrate and recalibrated else 0,
            refresh=refresh,
            resumed=recalibrated.resumed if recalibrated else None,
        )
        result = loop.run(start, lambda i: place(batches.at(i), mesh, P(ROWS)), step)
    unlearned, table = finished(result.trainable)
    if config.grip == "realign" and table is not None:
        trained = with_realigned(trained, table)
    return Unlearned(
        unlearned, result.step, config.steps, result.stopped, result.failed, trained, result.seconds_per_step, table
    )


def trained_layers(config: UnlearningConfig) -> tuple[int, int] | None:
    """RMU trains the steered layer and the two below it, as its authors do."""
    if config.objective in STEERING and config.trainable == "down_projections" and config.layer is not None:
        return max(1, config.layer - 2), config.layer
    return None


def _target(model: Model, forget: Rows, config: UnlearningConfig, seed: int, mesh: Mesh) -> jax.Array | None:
    """f32 [topics, D]: where RMU steers the rows of each topic, c u."""
    if config.objective not in STEERING:
        return None
    directions = steering_directions(jax.random.key(seed), int(forget.domain.max()) + 1, model.config.hidden_size)
    if config.steering is not None:
        return directions * config.steering
    assert config.layer is not None and config.steering_scale is not None
    indices = forget_sampler(forget.domain, config, seed=seed).__getitem__
    lengths = mean_lengths(model, forget, indices, layer=config.layer, mesh=mesh)
    return directions * (config.steering_scale * jnp.asarray(lengths))[:, None]


def _check_weights(config: UnlearningConfig, weights: RetainWeights | None, recalibrate: Recalibration | None) -> None:
    if weights is not None and weights.row_factor is not None:
        config.check_online()
    if recalibrate is not None and weights is None:
        raise ConfigError("recalibrate is given without weights; the steps before the first recalibration need some.")


def _check(model: Model, forget: Rows, retain: Rows | None, config: UnlearningConfig, selected) -> None:
    if config.retains and retain is None:
        raise ConfigError(
            f"objective {config.objective!r} has a retain term; give retain rows, or set retain_loss to 'none'."
        )
    if config.layer is not None and config.layer > model.config.num_layers:
        raise ConfigError(f"layer is {config.layer}, but the model has {model.config.num_layers} layers.")
    if config.trainable in CHOOSING and (selected is None or not selected.any()):
        raise ConfigError(
            f"trainable is {config.trainable!r}, but no expert is selected (experts is {config.experts!r}): use a "
            "weighting that selects experts, lower its tau, or name another rule in unlearning.experts."
        )
    if config.grip != "none" and retain is None:
        raise ConfigError(f"grip {config.grip!r} holds on to the routing of retain text; give retain rows.")
    if selected is not None:
        _check_selected(model, config, selected)
    for name, rows in (("forget", forget), ("retain", retain)):
        if rows is not None and not rows.valid.any():
            raise ValueError(f"the {name} rows hold no token that can be predicted; the data is too short.")


def _check_selected(model: Model, config: UnlearningConfig, selected: np.ndarray) -> None:
    shape = len(model.config.moe_layers), model.config.num_experts
    if selected.shape != shape:
        raise ValueError(f"selected is {selected.shape}; the model has {shape} (layers with experts, experts).")
    layers = [model.config.moe_layers[i] + 1 for i in np.flatnonzero(selected.any(axis=1))]
    if config.objective in STEERING and config.layer is not None and layers[0] > config.layer:
        where = ", ".join(map(str, layers))
        raise ConfigError(
            f"objective {config.objective!r} steers the output of layer {config.layer}, and the selected experts are "
            f"in layers {where}, above it: they would learn nothing. Set unlearning.layer to {layers[0]} or more."
        )
