"""What an attack is, what it is given and what it gives; and the attacks on the model itself.

Quantization rounds weights to few bits: it undoes a change that is smaller than a step (2410.16454). Router
swap puts the original routers back, and expert forcing sends every token to the experts that the original model sends
it to: GRIP's attack (docs/evaluation.md says what differs), made of likelihood scores. Both undo what was only hidden
by routing. Relearning trains on, on forget rows or on benign text: what comes back was hidden, not unlearned.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trace_jax.config import ConfigError, Section, as_dict, option
from trace_jax.data.corpora import Corpora, DataConfig
from trace_jax.data.rows import Rows, epoch_sampler
from trace_jax.data.sources import read_source, revision_of
from trace_jax.data.text import rows_of_documents
from trace_jax.evaluation.intervals import Measurement, bootstrap_mean, find, named
from trace_jax.evaluation.likelihood import NonFiniteScore, spread_indices
from trace_jax.evaluation.routing import SPLIT as TRAIN
from trace_jax.evaluation.task import SPLIT, Evaluator, Scoreboard, ScoreStore
from trace_jax.io.files import decode, remove, run_stage
from trace_jax.models.architecture import ModelConfig, flat_specs, flatten, unflatten
from trace_jax.models.model import Model, TextCodec
from trace_jax.routing.differences import overlap_by_row
from trace_jax.routing.statistics import Assignments, expert_assignments
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.optimizer import MOST, SCHEDULES, AdamW, Optimizer, OptimizerConfig
from trace_jax.unlearning.step import train_on

_MATRICES = ("q", "k", "v", "o", "attention_gate", "kv_down", "kv_up", "q_down", "q_up", "gate_up", "down")
_ROUTERS = ("layers/router", "layers/router_bias", "layers/router_correction")


@dataclasses.dataclass(frozen=True)
class Point:
    """What was measured in one form of an attack."""

    at: str  # the form in words, such as "4 bits" or "50 steps"
    measurements: Sequence[Measurement]  # of the attacked model
    original: Sequence[Measurement] = ()  # of the original one in this form, where the attack changes what is asked
    retrained: Sequence[Measurement] = ()  # of the one that never saw the forget set, where the attack teaches

    def to_json(self) -> dict[str, Any]:
        """Plain dict for NAME.json."""
        lists = {"measurements": self.measurements, "original": self.original, "retrained": self.retrained}
        return {"at": self.at} | {name: [m.to_json() for m in measured] for name, measured in lists.items() if measured}


class Attack(Section):
    """Settings of an attack, and what it does. `trace_jax.attacks` names them all."""

    read: ClassVar[Callable[[str], Any]] = staticmethod(read_source)

    @property
    def source(self) -> str | None:
        """A text of the user's own that the attack reads, by `read`, if any."""
        return None

    @property
    def revisions(self) -> list[str]:
        """Of that text: another one makes the attack anew."""
        return [revision_of(self.source)] if self.source else []

    def check_source(self) -> None:
        """Reads the text, long before the attack does. Raises DataError: it isn't there, or has another form."""
        if self.source:
            self.read(self.source)

    def prepare(self, context: "Context") -> Any:
        """What the attack makes once for all methods of a run (`Context.prepared`), before anything is unlearned; a
        ConfigError where the attack asks for more than the model reads at once, or than there is.
        """

    def points(self, case: "Case") -> list[Point]:
        """Attacks an unlearned model in one or several forms."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Context:
    """What an attack has, whichever method of a run made the unlearned model."""

    attack: Attack
    original: Model  # before unlearning
    corpora: Corpora
    data: DataConfig
    board: Scoreboard
    evaluator: Evaluator  # measures relative to the original (and the retrained) model
    mesh: Mesh
    seed: int
    directory: Path  # of files that all methods share
    identity: str  # hash of everything that they depend on
    original_routing: Callable[[], Assignments]  # of the forget rows, thinned to `evaluation.max_rows`
    load_retrained: Callable[[], Model] | None = None  # reads the model that never saw the forget set, if there is one

    @functools.cached_property
    def prepared(self) -> Any:
        """What `attack.prepare` gives."""
        return self.attack.prepare(self)

    @property
    def codec(self) -> TextCodec:
        """Of all models: they read text alike."""
        return TextCodec.of(self.original.replace(tokenizer=self.corpora.tokenizer))


@dataclasses.dataclass(frozen=True)
class Case:
    """An unlearned model under attack; it is not changed."""

    context: Context
    unlearned: Model
    directory: Path  # of this attack's files
    identity: str  # hash of everything that made the model and of the settings

    def measure(self, params: Any, name: str) -> list[Measurement]:
        """Everything that is measured on a model, with its scores kept under `name`."""
        model, store = self.unlearned.replace(params=params), ScoreStore(self.directory / name, self.identity)
        return self.context.evaluator.measure(self.context.evaluator.score(model, full=True, store=store))

    def attack(self) -> dict[str, Any]:
        """Attacks the model. Returns the content of NAME.json: "strongest" is the place of the point at which
        "measure", the forgetting measure, is largest on test (the first of equal ones), or None. An attack that breaks
        the model has no points, and "failed" says why.
        """
        points, failed, measure = [], "", self.context.board.forgetting
        try:
            points = self.context.attack.points(self)
        except NonFiniteScore as error:
            failed = str(error)
        ends = [find(point.measurements, measure, SPLIT) for point in points]
        values = {place: end.value for place, end in enumerate(ends) if end}
        return {
            "settings": as_dict(self.context.attack),
            "points": [point.to_json() for point in points],
            "measure": measure,
            "strongest": max(values, key=lambda place: values[place], default=None),
            "failed": failed,
        }


# --- parameters and routing changed without training


_FP4 = np.array([1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
_ABOVE, _BELOW = (  # quantiles of the normal distribution, 8 and 7
    np.array([statistics.NormalDist().inv_cdf(p) for p in np.linspace(1 - (1 / 32 + 1 / 30) / 2, 0.5, n)[:-1]])
    for n in (9, 8)
)
BLOCK_LEVELS = {"nf4": np.sort([*_ABOVE, 0, *-_BELOW]) / _ABOVE[0], "fp4": np.sort([*_FP4, 0, *-_FP4])}
BLOCK = 64  # weights that share a scale, their largest: the unit of the levels


class Quantization(Attack):
    """Weights rounded to few bits: symmetric integers per output channel, and bitsandbytes' 4-bit blocks."""

    bits: tuple[int, ...] = option((8, 4), help="bits of integers, one attack each", choices=tuple(range(2, 9)))
    blocks: tuple[str, ...] = option(("nf4", "fp4"), help="4-bit types, one attack each", choices=tuple(BLOCK_LEVELS))

    def __post_init__(self):
        super().__post_init__()
        if not self.bits and not self.blocks:
            raise ConfigError("bits and blocks are empty lists; give at least one form, such as bits = (8, 4).")

    def points(self, case: Case) -> list[Point]:
        model, forms = case.unlearned, {f"{bits} bits": bits for bits in self.bits} | {n: n for n in self.blocks}
        models = ((at, quantized(model.params, model.config, form=form)) for at, form in forms.items())
        return [Point(at, case.measure(params, at.replace(" ", "-"))) for at, params in models]


def quantized(params: Any, config: ModelConfig, *, form: int | str) -> Any:
    """Parameters with every matrix of attention, experts and dense layers rounded and back: to so many bits
    (`round_to_nearest`), or to the levels of a 4-bit type (`round_in_blocks`). Embedding, output head, routers, norms
    and biases stay as they are, as the usual tools leave them.
    """
    specs, flat = flat_specs(config), flatten(params)
    matrices = [path for path in flat if path.rpartition("/")[2] in _MATRICES]  # in one order in all processes
    rounding: Any = round_in_blocks if isinstance(form, str) else round_to_nearest
    return unflatten(flat | {path: rounding(flat[path], form, sides=specs[path].sides) for path in matrices})


@functools.partial(jax.jit, static_argnames=("sides", "bits"))
def round_to_nearest(weights: jax.Array, bits: int, *, sides: tuple[int, int]) -> jax.Array:
    """Each weight as the nearest multiple of its channel's step, in float32, ties to even; in the type of `weights`.

    A channel is an output, and `sides` (`ArraySpec.sides`) says which axes are inputs. Its largest absolute value is
    2^(bits-1) - 1 steps, so that 0 stays 0: with 8 bits LLM.int8() (2208.07339; vector-wise, activations aside).
    """
    exact, levels = weights.astype(jnp.float32), 2 ** (bits - 1) - 1
    largest = jnp.abs(exact).max(axis=tuple(range(*sides)), keepdims=True)
    step = jnp.where(largest > 0, largest, 1.0) / levels
    return (jnp.round(exact / step) * step).astype(weights.dtype)


@functools.partial(jax.jit, static_argnames=("sides", "levels"))
def round_in_blocks(weights: jax.Array, levels: str, *, sides: tuple[int, int]) -> jax.Array:
    """Each weight as the nearest of `BLOCK_LEVELS` times its block's largest absolute value, in the type of `weights`.

    Blocks are 64 weights that follow each other in the matrix [outputs, inputs]; its last one may be shorter. This is
    4-bit bitsandbytes without double quantization (NF4: QLoRA, 2305.14314, appendix E).
    """
    first, second = sides
    inputs, outputs = math.prod(weights.shape[first:second]), math.prod(weights.shape[second:])
    matrices = weights.astype(jnp.float32).reshape(-1, inputs, outputs).swapaxes(1, 2).reshape(-1, inputs * outputs)
    blocks = jnp.pad(matrices, ((0, 0), (0, -matrices.shape[1] % BLOCK))).reshape(len(matrices), -1, BLOCK)
    largest = jnp.abs(blocks).max(axis=-1, keepdims=True)
    level = jnp.asarray(BLOCK_LEVELS[levels], jnp.float32)
    nearest = jnp.searchsorted((level[1:] + level[:-1]) / 2, blocks / jnp.where(largest > 0, largest, 1.0))
    rounded = (level[nearest] * largest).reshape(len(matrices), -1)[:, : inputs * outputs]
    return rounded.reshape(-1, outputs, inputs).swapaxes(1, 2).reshape(weights.shape).astype(weights.dtype)


class RouterSwap(Attack):
    """The original routers, their biases and corrections put back under the unlearned experts. Nothing to set."""

    def points(self, case: Case) -> list[Point]:
        routers = {path: x for path, x in flatten(case.context.original.params).items() if path in _ROUTERS}
        swapped = unflatten(flatten(case.unlearned.params) | routers)
        return [Point("original routers", case.measure(swapped, "original-routers"))]


class ExpertForcing(Attack):
    """Every token forced in every layer to the experts that the original model sends it to; gate weights are what the
    unlearned model's routers make of their own scores of these experts. Nothing to set.
    """

    def points(self, case: Case) -> list[Point]:
        evaluator = case.context.evaluator
        scores = evaluator.score(case.unlearned.replace(guide=case.context.original.params))
        return [Point("original's experts", [*evaluator.measure(scores), self.forced_share(case)])]

    def forced_share(self, case: Case) -> Measurement:
        """Share of (token, layer) pairs at which the two models choose different sets, of forget rows thinned evenly to
        `evaluation.max_rows`; the interval is over rows.
        """
        context, settings = case.context, case.context.evaluator.config
        rows = context.corpora.forget.take(spread_indices(len(context.corpora.forget), settings.max_rows))
        now = expert_assignments(case.unlearned, rows, batch_size=settings.batch_size, mesh=context.mesh)
        overlap = overlap_by_row(context.original_routing(), now)
        pairs = overlap["tokens"] * overlap["unchanged"].shape[1]
        changed = pairs - overlap["unchanged"].sum(axis=1)
        interval = bootstrap_mean(changed, weights=pairs, resamples=settings.bootstrap, seed=context.seed)
        return named("forced_share", TRAIN, interval)


# --- training goes on


class TrainingOn(OptimizerConfig, Attack):
    """Training of all parameters goes on, in a run of its own for each length: its schedule ends there."""

    steps: tuple[int, ...] = option((50, 75, 100), help="optimizer steps, a run each; the worst counts", minimum=1)
    batch_size: int = option(4, help="rows per step", minimum=1)
    learning_rate: float = option(1e-5, help="peak learning rate", minimum=0.0, maximum=MOST)
    schedule: str = option("cosine", help="learning rate after warm-up, until the run ends", choices=SCHEDULES)
    optimizer: Optimizer = option(AdamW(b2=0.999), help="how gradients become updates")

    def points(self, case: Case) -> list[Point]:
        """A point for every run; the retrained model is trained in the same way, once for all methods."""
        context, title = case.context, case.directory.name.replace("_", " ")
        own = self._measured(context, lambda: case.unlearned, case.directory, case.identity, title)
        control, others = (context.directory, context.identity, f"{title} of the retrained model"), {}
        if context.load_retrained is not None:
            others = self._measured(context, context.load_retrained, *control)
        return [Point(f"{steps} steps", found, retrained=others.get(steps, ())) for steps, found in own.items()]

    def _measured(
        self, context: Context, load: Callable[[], Model], directory: Path, identity: str, title: str
    ) -> dict[int, list[Measurement]]:
        """Measurements by length of the run. A run that diverges has none."""

        def evaluate(params: Any) -> list[dict[str, Any]]:
            scores = context.evaluator.score(context.original.replace(params=params), full=True)
            return [m.to_json() for m in context.evaluator.measure(scores)]

        rows, measured = context.prepared, {}
        sampler = epoch_sampler(len(rows), self.batch_size, seed=context.seed)
        for steps in self.steps:
            place, about = directory / f"{steps}-steps", f"{title}, {steps} steps"

            def train(steps: int = steps, place: Path = place, about: str = about) -> None:
                train_on(
                    load(), self.optimization, lambda step: rows.batch(sampler(step)), steps=steps, evaluate=evaluate,
                    seed=context.seed, mesh=context.mesh, directory=place, identity=identity, title=about,
                )  # fmt: skip

            run_stage("training", place, identity, about, train)
            remove(place / "checkpoints")
            measured |= {row["step"]: row["evaluation"] for row in front_rows(place, identity)}
        return {steps: [decode(Measurement, m) for m in found] for steps, found in measured.items()}


class Relearning(TrainingOn):
    """Training goes on, on the forget rows or a share of them that is drawn by the run's seed. Defaults: those of
    MUSE-Books (2502.05374): the whole forget text, AdamW, cosine decay, runs of 50, 75 and 100 steps.
    """

    share: float = option(1.0, help="share of the forget rows that is trained on; 1 = all", minimum=0.0, maximum=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.share == 0:
            raise ConfigError("share is 0; the attack needs forget rows to train on. Give a share above 0, at most 1.")

    def prepare(self, context: Context) -> Rows:
        """The rows that are trained on."""
        rows = context.corpora.forget
        drawn = np.random.default_rng([context.seed, 5]).permutation(len(rows))
        return rows.take(np.sort(drawn[: max(1, round(self.share * len(rows)))]))


class BenignRelearning(TrainingOn):
    """Training goes on, on text that has nothing to do with the forget set (2406.13356, 2409.18025)."""

    source: str | None = option(None, help="that text (`read_source`); None: retain rows, neighbours aside")

    def prepare(self, context: Context) -> Rows:
        """The source's text in rows like those of the run; without one, retain rows that are not of neighbours."""
        if self.source is None:
            retain = context.corpora.retain
            return retain.take(np.flatnonzero(retain.domain == 0)) if (retain.domain == 0).any() else retain
        return rows_of_documents(context.codec, read_source(self.source)[0], context.data.row_length)
