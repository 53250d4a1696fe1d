"""One optimizer step, for training a target model and for unlearning from it; and what runs the former to an end.

Loss and gradient are computed inside `jax.shard_map` over the whole mesh: parameters as they are stored, rows split.
Then the optimizer updates every stored number where it is.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey
from tokenizers import Tokenizer

from trace_jax.config import ConfigError
from trace_jax.data.rows import Batch, Rows, epoch_sampler
from trace_jax.io.progress import quiet
from trace_jax.models.architecture import ModelConfig, abstract_params, flatten, init_params, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, place, row_shards
from trace_jax.unlearning import trainable
from trace_jax.unlearning.config import EXPERT_MATRICES, UnlearningConfig
from trace_jax.unlearning.grip import check_router, keep_routers
from trace_jax.unlearning.inputs import StepRows, feed, pad_rows
from trace_jax.unlearning.loop import Hook, Loop, LoopResult, TrainState
from trace_jax.unlearning.losses import Constants, StepSettings, coefficients, gradient, share
from trace_jax.unlearning.objectives import RepSelect
from trace_jax.unlearning.optimizer import OptimizerConfig, TrainingConfig, learning_rates, make_optimizer
from trace_jax.unlearning.trainable import Flat, current_params, trained_specs


def set_up(
    original: Flat, config: UnlearningConfig, model: ModelConfig, *,
    selected: np.ndarray | None, parallel: ParallelConfig, mesh: Mesh, seed: int = 0,
) -> tuple[StepSettings, Constants, Callable[[Constants], TrainState]]:  # fmt: skip
    """What the step of a run works with, for the run itself and for a plan of it, and what makes its first state.

    original: parameters by path on the mesh, or their shapes. All else in the constants is small, and on the host.
    selected: bool [L, E], the experts that train where not all do.
    """
    config.check_layer(model.num_layers)
    # A constant rate does not depend on the number of steps; leaving it out saves a compilation per number.
    # Where the rows of an epoch are not known (a plan), their number is not either.
    steps = 0 if config.schedule == "constant" else config.steps
    settings = StepSettings(
        model, config.optimization, steps, config.objective.without_numbers(), config.retain_loss.name,
        config.normalize, config.layer, parallel, config.trainable.anchor_form,
    )  # fmt: skip
    paths = trainable.trainable_paths(model, config.trainable)
    if config.grip.name == "project":
        check_router(model, paths)
    if isinstance(config.objective, RepSelect) and (rest := sorted(set(paths) - set(EXPERT_MATRICES))):
        raise ConfigError(
            f"objective 'repselect' collapses gradients of matrices of experts, and {', '.join(rest)} would train as "
            f"well; leave trainable out, or take of {', '.join(EXPERT_MATRICES)}."
        )
    masks = trainable.update_masks(paths, model, layers=config.layers, selected=selected)
    index = None if selected is None else trainable.selected_index(selected)
    numbers = np.int32(seed), np.float32(config.alpha) if config.objective.next_alpha else None
    static: Any = {"paths": paths, "rank": config.trainable.rank, "settings": settings, "mesh": mesh}
    start = functools.partial(_unlearning_state, *numbers, **static)
    return settings, Constants(original, index, masks, coefficients(config)), start


def row_multiple(settings: StepSettings, mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return row_shards(mesh) * settings.parallel.microbatches


# --- the state


def initial_state(trained: Flat, settings: StepSettings, mesh: Mesh) -> TrainState:
    """Fresh state on `mesh` of arrays that lie anywhere. They are copied: donating it frees nobody else's."""
    trained = place(trained, mesh, trained_specs(settings.model, trained, mesh))
    return fresh_state(trained, None, None, settings=settings, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("paths", "rank", "settings", "mesh"))
def _unlearning_state(seed, alpha, c: Constants, *, paths, rank, settings: StepSettings, mesh: Mesh) -> TrainState:
    trained = trainable.split(c.original, paths, settings.model, mesh, index=c.index, rank=rank, seed=seed)
    return fresh_state(trained, c.masks, alpha, settings=settings, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def fresh_state(trained: Flat, masks: Flat | None, alpha: Any, *, settings: StepSettings, mesh: Mesh) -> TrainState:
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trained)
    alpha = None if alpha is None else jnp.asarray(alpha, jnp.float32)
    optimizer = _optimizer(settings, masks, trained).init(trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer, alpha)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh))


def _optimizer(settings: StepSettings, masks: Flat | None, trained: Flat) -> optax.GradientTransformation:
    axes = {path: spec.axes for path, spec in trainable.declarations(settings.model, trained).items()}
    return make_optimizer(settings.optimizer, settings.steps, axes, masks)


def state_shardings(state: Any, settings: StepSettings, mesh: Mesh) -> Any:
    """How a `TrainState` is stored: whatever is kept for a parameter lies where the parameter does; an array of another
    shape, such as a mean over the rows of a matrix, in the first dimensions that both have: layers and experts.
    """
    specs = trained_specs(settings.model, state.trainable, mesh)

    def one(path, leaf):
        names = [key.key for key in path if isinstance(key, DictKey) and key.key in specs]
        if not names:
            return NamedSharding(mesh, P())
        spec, shape = specs[names[-1]], state.trainable[names[-1]].shape
        if leaf.shape == shape:
            return NamedSharding(mesh, spec)
        pairs = enumerate(zip(leaf.shape, shape, strict=False))
        same = next((d for d, (size, other) in pairs if size != other), min(len(leaf.shape), len(shape)))
        used = max((d + 1 for d, entry in enumerate(spec[:same]) if entry is not None), default=0)
        return NamedSharding(mesh, P(*spec[:used]))

    return jax.tree_util.tree_map_with_path(one, state)


def apply_gradients(
    state: TrainState, gradients: Flat, settings: StepSettings, masks: Flat | None, mesh: Mesh
) -> tuple[TrainState, jax.Array]:
    """(the state after the optimizer's update, norm of the gradients f32 [])."""
    optimizer = _optimizer(settings, masks, state.trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trained: Any = optax.apply_updates(state.trainable, updates)
    state = TrainState(state.step + 1, trained, optimizer_state, state.alpha)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh)), optax.tree.norm(gradients)


# --- steps


@functools.partial(jax.jit, static_argnames=("settings", "load_balance", "mesh"), donate_argnums=0)
def training_step(state: TrainState, batch: Batch, *, settings: StepSettings, load_balance: float, mesh: Mesh):
    """One step of next-token training on `batch`. Returns (state, metrics: f32 scalars)."""
    model, like = settings.model, flatten(abstract_params(settings.model))

    def loss(trained, batch):
        params = unflatten(current_params(trained, like))
        collect = ("hidden", "counts", "load")
        out: Any = forward(params, model, batch.tokens, mask=batch.segments, count_mask=batch.valid, collect=collect)
        nll = token_nll(params, model, out.hidden, jnp.roll(batch.tokens, -1, axis=1))
        tokens = jnp.maximum(jax.lax.psum(batch.valid.sum(dtype=jnp.float32), BATCH_AXES), 1.0)
        mean = share(jnp.where(batch.valid, nll, 0.0).sum(), tokens)
        # Switch-style balance: E sum_e (share of activations) (mean probability), 1 when perfectly even.
        frequency = jax.lax.psum(out.router.counts, BATCH_AXES).astype(jnp.float32) / (tokens * model.experts_per_token)
        probability = jax.lax.psum(out.router.load, BATCH_AXES) / tokens
        balance = model.num_experts * (frequency * probability).sum(-1).mean()
        return mean + load_balance * balance, {"loss": mean, "balance": balance}

    specs, of_device = param_specs(model, mesh), jax.grad(loss, has_aux=True)
    sharded = jax.shard_map(of_device, mesh=mesh, in_specs=(specs, P(BATCH_AXES)), out_specs=(specs, P()))
    gradients, metrics = sharded(state.trainable, batch)
    state, norm = apply_gradients(state, gradients, settings, None, mesh)
    return state, {**metrics, "gradient_norm": norm}


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def batch_gradient(
    trained: Flat, alpha: Any, constants: Constants, rows: StepRows, *, settings: StepSettings, mesh: Mesh
) -> tuple[Flat, dict]:
    """(gradient of gamma L_forget + alpha L_retain by what trains, metrics); alpha f32 [] only where it changes."""
    trains = trained_specs(settings.model, trained, mesh)
    others = (P() for _ in Constants._fields[1:])
    constant_specs: Any = Constants(param_specs(settings.model, mesh), *others)  # pyright: ignore[reportArgumentType] specs
    in_specs, of_device = (trains, P(), constant_specs, P(BATCH_AXES)), functools.partial(gradient, settings=settings)
    sharded = jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=(trains, P()))
    return sharded(trained, alpha, constants._replace(masks=None, protection=None, direction=None), rows)


@functools.partial(jax.jit, static_argnames=("settings", "mesh"), donate_argnums=0)
def unlearning_step(state: TrainState, constants: Constants, rows: StepRows, *, settings: StepSettings, mesh: Mesh):
    """(state, metrics) after a step of gamma L_forget + alpha L_retain on a multiple of `row_multiple` rows."""
    gradients, metrics = constants.direction, {}
    if gradients is None:
        gradients, metrics = batch_gradient(state.trainable, state.alpha, constants, rows, settings=settings, mesh=mesh)
    state, norm = apply_gradients(state, gradients, settings, constants.masks, mesh)
    if constants.protection is not None:
        held = constants.original, constants.protection, state.step
        trained, metrics["grip_missed"] = keep_routers(state.trainable, *held, mesh=mesh)
        state = dataclasses.replace(state, trainable=trained)
        state = jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh))
    if state.alpha is not None:
        metrics["alpha"] = state.alpha
        following = settings.objective.with_numbers(constants.numbers).next_alpha
        state = dataclasses.replace(state, alpha=following(state.alpha, state.step, metrics["retain_loss"]))
    return state, {**metrics, "gradient_norm": norm}


# --- runs of next-token training


def train_model(
    model: ModelConfig, config: TrainingConfig, batch_at: Callable[[int], Batch], *,
    seed: int, mesh: Mesh, directory: Path, identity: str, title: str, tokenizer: Any = None,
) -> Model:  # fmt: skip
    """Trains `config.steps` steps on `batch_at(step)`; continues from `directory` if it was interrupted. A target model
    that diverged is of no use to anyone: raises FloatingPointError where the loss stops being finite.
    """
    loop = Loop(directory, identity, config.steps, config.checkpoint_every, title, seed=seed)
    first, settings = jax.random.key(seed), StepSettings(model, config.optimization, config.steps)
    result = _train(loop, lambda: init_params(model, first), batch_at, settings, mesh, config.load_balance)
    if result.stopped:
        raise FloatingPointError(f"{title}: {result.stopped}.")
    return Model(model, _params(result.trainable, model), tokenizer)


def train(
    model: ModelConfig, rows: Rows, *, config: TrainingConfig | None = None, tokenizer: Tokenizer | None = None,
    seed: int = 0, mesh: Mesh | None = None, verbose: bool = True,
) -> Model:  # fmt: skip
    """A small model trained on `rows` from its first values on, to try things on; nothing is kept on disk.

    Args:
      model: its shape; rows: packed text, each row once in an epoch, reshuffled.
      config: steps, rows per step and the optimizer; default `TrainingConfig()`.
      tokenizer: what the rows were packed with; the model keeps it.
      verbose: whether stderr says how far it is.

    Raises:
      FloatingPointError: the loss stopped being finite.  ValueError: tokens that the model doesn't know.

    Example:
      >>> trained = tj.train(model.config, retain, config=tj.TrainingConfig(steps=2, batch_size=4), verbose=False)
      >>> trained.config == model.config
      True
    """
    model.check_tokens(rows.tokens, "the rows")
    config, mesh = config or TrainingConfig(), mesh or PLAIN.mesh()
    order = epoch_sampler(len(rows), config.batch_size, seed=seed)
    with tempfile.TemporaryDirectory() as scratch, quiet(not verbose):
        about: Any = {"directory": Path(scratch), "identity": "", "title": "training", "tokenizer": tokenizer}
        return train_model(model, config, lambda step: rows.batch(order(step)), seed=seed, mesh=mesh, **about)


def train_on(
    model: Model, config: OptimizerConfig, batch_at: Callable[[int], Batch], *,
    steps: int, evaluate: Callable[[Any], Any],
    seed: int, mesh: Mesh, directory: Path, identity: str, title: str,
) -> None:  # fmt: skip
    """Trains all parameters of a model, which is not changed, on `batch_at(step)`; continues if interrupted, and ends
    if it diverges. What `evaluate` makes of the parameters at the end is in `directory` (`metrics.front_rows`).
    """
    evaluation = Hook(steps, lambda _, trained: evaluate(_params(trained, model.config)))
    loop = Loop(directory, identity, steps, steps, title, evaluation, seed=seed, evaluate_first=False)
    _train(loop, lambda: model.params, batch_at, StepSettings(model.config, config, steps), mesh)


def _train(loop: Loop, start, batch_at, settings: StepSettings, mesh: Mesh, load_balance: float = 0.0) -> LoopResult:
    multiple, rates = row_multiple(settings, mesh), learning_rates(settings.optimizer, loop.steps)
    return loop.run(
        lambda: initial_state(flatten(start()), settings, mesh),
        feed(lambda index: pad_rows(batch_at(index), multiple), rates, mesh),
        lambda state, batch: training_step(state, batch, settings=settings, load_balance=load_balance, mesh=mesh),
    )


def _params(trained: Flat, config: ModelConfig) -> Any:
    return unflatten(current_params(trained, flatten(abstract_params(config))))
