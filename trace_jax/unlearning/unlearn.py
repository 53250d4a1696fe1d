"""Unlearning: from a model, forget rows and weighted retain rows to a model that has forgotten."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.rows import Rows, encode_refusals, with_refusals
from trace_jax.io.files import as_path, encode, read_json, remove, write_json
from trace_jax.io.progress import quiet, say
from trace_jax.io.tracking import Tracker
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.model import Model
from trace_jax.models.sharding import chosen_mesh, placed_params
from trace_jax.parallel.mesh import PLAIN, ParallelConfig, place
from trace_jax.parallel.processes import is_main
from trace_jax.routing.statistics import DamagedRouting
from trace_jax.routing.weights import Recalibration, RetainWeights
from trace_jax.unlearning.config import Calibrated, GripRealign, UnlearningConfig
from trace_jax.unlearning.grip import grip_hooks, with_realigned
from trace_jax.unlearning.inputs import Inputs, batch_text, cached_reference, feed, steering_target, with_steps
from trace_jax.unlearning.loop import Hook, Loop
from trace_jax.unlearning.losses import Constants
from trace_jax.unlearning.metrics import step_rows
from trace_jax.unlearning.objectives import Referring, Refusing, RepSelect, Steering
from trace_jax.unlearning.optimizer import learning_rates
from trace_jax.unlearning.repselect import forget_direction
from trace_jax.unlearning.step import row_multiple, set_up, unlearning_step
from trace_jax.unlearning.trainable import Flat, merge, table_text, trainable_table


@dataclasses.dataclass(frozen=True)
class Unlearned:
    """The outcome of unlearning."""

    model: Model
    step: int  # how many steps it is away from the target model
    steps: int  # how many the run was to take
    stopped: str  # why the run ended before that, or ""
    failed: bool  # whether by an error, not by a rule that was asked for
    trained: list[dict]  # table of what trained (`trainable_table`)
    seconds_per_step: float
    grip: list[dict] | None = None  # what was protected in each layer, or how its router was realigned
    # What is written of each step, from the first on, also where a run was continued: {"step", "time", "tokens",
    # "learning_rate", "loss", "forget_loss", "gradient_norm", ...}; of several processes the first one has it
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        why = [self.stopped] if self.stopped else []
        ends = self.history[:1] + self.history[-1:]
        losses = [f"{n} {' -> '.join(f'{row[n]:.3g}' for row in ends)}" for n in (ends or [{}])[0] if "loss" in n]
        return f"Unlearned({', '.join([f'step {self.step} of {self.steps}', *why, *losses, repr(self.model)])})"


def unlearn(
    model: Model, forget: Rows, retain: Rows | None, *,
    config: UnlearningConfig, weights: RetainWeights | None = None, selected: np.ndarray | None = None,
    recalibrate: Recalibration | None = None, seed: int = 0, mesh: Mesh | None = None, parallel: ParallelConfig = PLAIN,
    directory: str | os.PathLike | None = None, identity: str | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    callback: Callable[[int, dict[str, float]], Any] | None = None, title: str = "unlearning", verbose: bool = True,
    tracker: Tracker | None = None,
) -> Unlearned:  # fmt: skip
    """Unlearns `forget` from `model` while holding on to `retain`.

    Args:
      model: the target model; it is not changed, and its frozen parameters are shared with the result.
      forget, retain: packed rows. `forget.domain` numbers the topics to forget. `retain` may be None for objectives
        without a retain term.
      weights: of retain tokens, and how often each row is drawn (`trace_jax.routing`); None = uniform.
      selected: bool [L, E], the experts that train when `config.trainable` is "selected_experts" or "seuf"
        (`trace_jax.unlearning.trainable.chosen_experts`); default: those of `weights` where its `experts` are of the
        "calibration". Recalibration does not change them.
      recalibrate: solves `weights` anew every few steps, under the model as it is then; they are kept in `directory`.
      seed: of batch order, of RMU's directions and of low-rank factors.
      mesh, parallel: the devices, and how the step is laid out on them; no mesh: one as `parallel` says.
      directory: where metrics.jsonl and resumable state go; None keeps nothing.
      identity: hash of everything that made this run; state of another one in `directory` is not continued. Default:
        of settings, shape, rows, weights and how they are recalibrated, not of the model's parameters.
      evaluate: called with parameters at step 0, every `config.evaluate_every` steps and at the end. What it returns
        (JSON; of a list each item) is a line of metrics.jsonl; rules about when to stop and what to keep need an
        `Evaluated`.
      callback: called with the number of each step, from 1, and its metrics, the time, the tokens and the learning rate
        (docs/tracking.md), while the next one runs, on every process. What it raises ends the run; the same call with
        the same `directory` goes on from the last saved state.
      verbose: whether stderr says what is done, with a progress bar on a terminal.
      tracker: shows what goes into metrics.jsonl; what it can't do ends no run.

    After a NaN it returns the last good state and the reason.

    Raises:
      ConfigError: retain data missing for an objective that needs it; a layer the model doesn't have; selected
        experts missing; refusals without a tokenizer; a rule without an evaluation to read; online weights that a
        batch would have to be divided by; recalibration without weights to start from; routers that GRIP can't hold.
      ValueError: rows without a token that can be predicted, or with tokens that the model doesn't know; weights of
        other rows.

    Example:
      >>> config = tj.UnlearningConfig(steps=3, forget_batch_size=2, retain_batch_size=2)
      >>> losses = []
      >>> keep = lambda step, metrics: losses.append(metrics["forget_loss"])
      >>> done = tj.unlearn(model, forget, retain, config=config, callback=keep, verbose=False)
      >>> losses == [row["forget_loss"] for row in done.history], done.step
      (True, 3)
    """
    objective, experts = config.objective, config.trainable.experts
    if selected is None and weights is not None and isinstance(experts, Calibrated):
        selected = weights.selected
    selected = None if experts is None else selected
    _check(model, forget, retain, config, selected, weights, recalibrate, evaluate)
    with quiet(not verbose), tempfile.TemporaryDirectory() as scratch:
        refusals = None
        if isinstance(objective, Refusing):
            encoded = encode_refusals(objective.refusals, model.tokenizer, model.special)
            forget, refusals = with_refusals(forget, encoded, pad=model.special.pad)
        if mesh is None:
            length = forget.tokens.shape[1]
            parallel = chosen_mesh(parallel, model.config, config.batches, length, len(jax.devices()))
            mesh = parallel.mesh()
        config = with_steps(config, forget, retain)
        say(f"{title}: {batch_text(config, forget, retain, mesh, parallel.microbatches, refusals)}")
        original = flatten(placed_params(model.params, model.config, mesh))
        about = {"selected": selected, "parallel": parallel, "mesh": mesh, "seed": seed}
        settings, constants, start = set_up(original, config, model.config, **about)
        trained = trainable_table(model.config, config, selected)
        say(f"{title}: {table_text(trained).partition(chr(10))[0]}")
        if identity is None:
            of = [*vars(forget).values(), *({} if retain is None else vars(retain)).values()]
            of += [] if weights is None else [weights.tokens, weights.row_probability, weights.step_weights]
            of = [hashlib.sha256(array.tobytes()).hexdigest() for array in of]
            anew = () if recalibrate is None else (recalibrate.config,)
            trained_alone = None if selected is None else selected.tolist()
            identity = fingerprint(config, model.config, trained_alone, seed, of, *anew)
        protection, finish = grip_hooks(model.replace(params=unflatten(original)), retain, config, seed=seed, mesh=mesh)
        constants = Constants(original, *place(constants[1:], mesh))._replace(
            target=place(steering_target(model, forget, config, seed=seed, mesh=mesh), mesh),
            online=place(weights.step_calibration, mesh) if weights is not None and config.retains else None,
            protection=protection,
        )
        if isinstance(objective, RepSelect):
            direction = forget_direction(constants, forget, config, settings, seed=seed, mesh=mesh)
            constants = constants._replace(direction=direction)

        def step(state, rows):
            return unlearning_step(state, constants, rows, settings=settings, mesh=mesh)

        def model_of(trained: Flat) -> Model:
            """The model that trains, or that what it has learnt is subtracted from."""
            how: Any = {"scale": constants.numbers.get("lora_scale"), "subtract": objective.task_scale}
            params = merge(original, trained, model.config, mesh, index=constants.index, **how)
            return model.replace(params=unflatten(params))

        where, multiple, reference = as_path(directory or scratch), row_multiple(settings, mesh), None
        if isinstance(objective, Referring) and objective.cache_reference:
            size = multiple * config.forget_batch_size
            reference = cached_reference(where, identity, model, forget, refusals, mesh=mesh, batch_size=size)
        rows = {"refusals": refusals, "reference": reference}
        inputs = Inputs(forget, retain, weights, config, seed=seed, multiple=multiple, **rows)
        evaluation = refresh = None
        if evaluate is not None:
            evaluation = Hook(config.evaluate_every, lambda _, trained: evaluate(finish(model_of(trained))[0].params))
        if recalibrate is not None and weights is not None and config.retains:
            of_run = {"directory": where, "identity": identity, "title": title}
            refresh = recalibration(recalibrate, weights, model_of, inputs.weigh, **of_run)
        steps, every = config.steps, config.checkpoint_every
        about = {"seed": seed, "rules": config, "callback": callback, "tracker": tracker}
        loop = Loop(where, identity, steps, every, title, evaluation, refresh, **about)
        result = loop.run(lambda: start(constants), feed(inputs.at, learning_rates(config, steps), mesh), step)
        unlearned, table = finish(model_of(result.trainable))
        if table is not None and isinstance(config.grip, GripRealign):
            trained = with_realigned(trained, table)
        how = result.step, config.steps, result.stopped, result.failed, trained, result.seconds_per_step, table
        return Unlearned(unlearned, *how, step_rows(where, identity) if is_main() else [])


def _check(
    model: Model, forget: Rows, retain: Rows | None, config: UnlearningConfig, selected: np.ndarray | None,
    weights: RetainWeights | None, recalibrate: Recalibration | None, evaluate: Callable | None,
) -> None:  # fmt: skip
    """Raises a ConfigError or ValueError that says what does not fit together (arguments as in `unlearn`)."""
    if config.retains and retain is None:
        name = config.objective.name
        raise ConfigError(f"objective {name!r} has a retain term; give retain rows, or set retain_loss to 'none'.")
    if config.grip.name != "none" and retain is None:
        raise ConfigError(f"grip {config.grip.name!r} holds on to the routing of retain text; give retain rows.")
    for name, rows in (("forget", forget), ("retain", retain)):
        if rows is not None and not rows.valid.any():
            raise ValueError(f"the {name} rows hold no token that can be predicted; the data is too short.")
        if rows is not None:
            model.config.check_tokens(rows.tokens, f"the {name} rows")
    if config.needs_evaluation and evaluate is None:
        raise ConfigError(
            "stop_forgetting, stop_utility and keep read evaluations; give `evaluate`, or leave them out."
        )
    if weights is not None and retain is not None and weights.corpus not in ("", retain.digest):
        raise ValueError("the weights were made for other retain rows; make them with `retain_weights` for these.")
    if weights is not None and weights.online:
        config.check_online()
    if recalibrate is not None and weights is None:
        raise ConfigError("recalibrate is given without weights; the steps before the first recalibration need some.")
    if config.trainable.experts is None:
        return
    if selected is None or not selected.any():
        raise ConfigError(
            f"trainable is {config.trainable.name!r}, but no expert is selected: use a weighting that selects experts, "
            "lower its tau, or name another rule in unlearning.trainable.experts."
        )
    shape = len(model.config.moe_layers), model.config.num_experts
    if selected.shape != shape:
        raise ValueError(f"selected is {selected.shape}; the model has {shape} (layers with experts, experts).")
    layers = [model.config.moe_layers[i] + 1 for i in np.flatnonzero(selected.any(axis=1))]
    if isinstance(config.objective, Steering) and layers[0] > config.layer:
        raise ConfigError(
            f"objective {config.objective.name!r} steers the output of layer {config.layer}, and the selected experts "
            f"are in layers {', '.join(map(str, layers))}, above it: they would learn nothing. Set "
            f"unlearning.objective.layer to {layers[0]} or more."
        )


def recalibration(
    solve: Recalibration, weights: RetainWeights, model_of: Callable[[Any], Model],
    use: Callable[[RetainWeights], None], *, directory: Path, identity: str, title: str,
) -> Hook:  # fmt: skip
    """Solves retain weights anew while a run goes on, and keeps them on disk so that a continued run has the same: in
    `recalibration/step-NNNNNN`, the weights from step NNNNNN on (see `RetainWeights.save`), then drift.json, without
    which they do not count. A call returns the drift, for metrics.jsonl. `use` is called with those that replace
    `weights`; `model_of` makes the model of trained arrays.
    """

    def folder(step: int) -> Path:
        return directory / "recalibration" / f"step-{step:06d}"

    def refresh(step: int, trained: Any) -> dict[str, Any]:
        """Solves for the weights of the steps from `step` on, under the model before that step."""
        nonlocal weights
        if step == solve.every:  # what is there is of an earlier run
            remove(folder(step).parent)
        try:
            weights, drift = solve(model_of(trained), weights)
            values, words = encode(drift), drift.text()
        except DamagedRouting as error:  # the next step's loss says so too, and ends the run
            values, words = {"problem": str(error)}, f"{error} The last weights are kept."
        weights.save(folder(step))
        write_json(folder(step) / "drift.json", {"step": step, "identity": identity, **values})
        say(f"{title}: recalibration after step {step}: {words}")
        use(weights)
        return values

    def resumed(step: int) -> None:
        """Reads the weights that step `step - 1` was taken with; those of `step` are solved for again where due."""
        nonlocal weights
        newest = (step - 1) // solve.every * solve.every
        if newest == 0:
            return
        about = read_json(folder(newest) / "drift.json")
        if about is None or about.get("identity") != identity:
            raise ValueError(
                f"{folder(newest)}: the weights that this run had solved for after step {newest} are not there, and it "
                f"can't go on as it was. Remove {directory / 'checkpoints'} to run it from the beginning."
            )
        weights = RetainWeights.load(folder(newest))
        use(weights)

    return Hook(solve.every, refresh, resumed)
