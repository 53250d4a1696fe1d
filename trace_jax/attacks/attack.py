"""What an attack is, what it is given and what it gives; and the attacks on the model itself.

Quantization rounds weights to nearest in few bits: it undoes a change that is smaller than a step (2410.16454). Router
swap puts the original routers back, and expert forcing sends every token to the experts that the original model sends
it to: GRIP's attack (docs/evaluation.md says what differs), made of likelihood scores. Both undo what was only hidden
by routing. Relearning trains on, on forget rows or on benign text: what comes back was hidden, not unlearned.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trace_jax.config import ConfigError, Section, as_dict, option
from trace_jax.data.corpora import Corpora, DataConfig
from trace_jax.data.rows import Rows, encode_documents, epoch_sampler, pack_documents, sequential_batches
from trace_jax.data.sources import read_source, revision_of
from trace_jax.evaluation.intervals import Measurement, bootstrap_mean, find, named
from trace_jax.evaluation.likelihood import NonFiniteScore, spread_indices
from trace_jax.evaluation.routing import SPLIT as TRAIN
from trace_jax.evaluation.task import SPLIT, Evaluator, ScoreStore
from trace_jax.io.files import decode, read_json, remove, write_json
from trace_jax.models.architecture import ModelConfig, flat_specs, flatten, unflatten
from trace_jax.models.model import Model, TextCodec
from trace_jax.parallel.processes import barrier, broadcast_from_process_0
from trace_jax.routing.statistics import Assignments, expert_assignments, overlap_by_row
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.optimizer import Optimizer, OptimizerConfig
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

    @property
    def source(self) -> str | None:
        """A text of the user's own that the attack reads (`trace_jax.data.sources.read_records`), if any."""
        return None

    @property
    def revisions(self) -> list[str]:
        """Of that text: another one makes the attack anew."""
        return [revision_of(self.source)] if self.source else []

    def check_source(self) -> None:
        """Reads the text, long before the attack does. Raises DataError: it isn't there, or has another form."""

    def prepare(self, context: "Context") -> Any:
        """What the attack makes once for all methods of a run (`Context.prepared`), before anything is unlearned.

        Raises a ConfigError where the attack asks for more than the model reads at once, or than there is.
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
        """Attacks the model. Returns the content of NAME.json.

        "strongest" is the place of the point at which "measure", the forgetting measure, is largest on test (the first
        of equal ones), or None. An attack that breaks the model has no points, and "failed" says why.
        """
        points, failed, measure = [], "", self.context.data.board.forgetting
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


class Quantization(Attack):
    """Weights rounded to few bits."""

    bits: tuple[int, ...] = option((8, 4), help="bits of a weight, one attack each", choices=tuple(range(2, 9)))

    def __post_init__(self):
        super().__post_init__()
        if not self.bits:
            raise ConfigError("bits is an empty list; give at least one number of bits, such as (8, 4).")

    def points(self, case: Case) -> list[Point]:
        model = case.unlearned
        models = ((bits, quantized(model.params, model.config, bits=bits)) for bits in self.bits)
        return [Point(f"{bits} bits", case.measure(params, f"{bits}-bits")) for bits, params in models]


def quantized(params: Any, config: ModelConfig, *, bits: int) -> Any:
    """Parameters with every matrix of attention, experts and dense layers rounded to `bits` bits and back.

    Embedding, output head, routers, norms and biases stay as they are, as the usual tools leave them.
    """
    specs, flat = flat_specs(config), flatten(params)
    matrices = [path for path in flat if path.rpartition("/")[2] in _MATRICES]  # in one order in all processes
    rounded = {p: round_to_nearest(flat[p], axes=tuple(range(*specs[p].sides)), bits=bits) for p in matrices}
    return unflatten(flat | rounded)


@functools.partial(jax.jit, static_argnames=("axes", "bits"))
def round_to_nearest(weights: jax.Array, *, axes: tuple[int, ...], bits: int) -> jax.Array:
    """Each weight as the nearest multiple of its channel's step, in float32, ties to even; in the type of `weights`.

    A channel is an output of the matrix, and `axes` are its inputs. Steps are symmetric: the largest absolute value of
    a channel is 2^(bits-1) - 1 of them, so that 0 stays 0.
    """
    exact, levels = weights.astype(jnp.float32), 2 ** (bits - 1) - 1
    largest = jnp.abs(exact).max(axis=axes, keepdims=True)
    step = jnp.where(largest > 0, largest, 1.0) / levels
    return (jnp.round(exact / step) * step).astype(weights.dtype)


class RouterSwap(Attack):
    """The original routers put back under the unlearned experts. Nothing to set."""

    def points(self, case: Case) -> list[Point]:
        """Measures the unlearned model with every router, its bias and its correction as they were before."""
        routers = {path: x for path, x in flatten(case.context.original.params).items() if path in _ROUTERS}
        swapped = unflatten(flatten(case.unlearned.params) | routers)
        return [Point("original routers", case.measure(swapped, "original-routers"))]


class ExpertForcing(Attack):
    """Tokens forced to the experts that the original model sends them to. Nothing to set."""

    def points(self, case: Case) -> list[Point]:
        """Measures the unlearned model while the original chooses the experts of every token in every layer.

        Gate weights are what the unlearned model's routers make of their own scores of these experts. `forced_share` is
        measured beside: how often that differs from what the unlearned model would have chosen.
        """
        evaluator = case.context.evaluator
        scores = evaluator.score(case.unlearned.replace(guide=case.context.original.params))
        return [Point("original's experts", [*evaluator.measure(scores), self.forced_share(case)])]

    def forced_share(self, case: Case) -> Measurement:
        """Share of (token, layer) pairs of the forget rows at which the two models choose different sets.

        Of rows thinned evenly to `evaluation.max_rows`; the interval is over rows.
        """
        context, settings = case.context, case.context.evaluator.config
        rows = context.corpora.forget.take(spread_indices(len(context.corpora.forget), settings.max_rows))
        batches = sequential_batches(rows, settings.batch_size)
        overlap = overlap_by_row(
            context.original_routing(), expert_assignments(case.unlearned, batches, mesh=context.mesh)
        )
        pairs = overlap["tokens"] * overlap["unchanged"].shape[1]
        changed = pairs - overlap["unchanged"].sum(axis=1)
        interval = bootstrap_mean(changed, weights=pairs, resamples=settings.bootstrap, seed=context.seed)
        return named("forced_share", TRAIN, interval)


# --- training goes on


class TrainingOn(Attack):
    """Training of all parameters goes on. Defaults: MUSE's relearning (100 steps of 4 rows at 1e-5)."""

    steps: int = option(100, help="optimizer steps", minimum=1)
    evaluate_every: int = option(25, help="steps between evaluations, of which the worst counts", minimum=1)
    batch_size: int = option(4, help="rows per step", minimum=1)
    learning_rate: float = option(1e-5, help="learning rate, constant", minimum=0.0)
    optimizer: Optimizer = option("adamw", help="how gradients become updates")

    @property
    def optimization(self) -> OptimizerConfig:
        """The optimizer's settings."""
        return OptimizerConfig(optimizer=self.optimizer, learning_rate=self.learning_rate)

    def points(self, case: Case) -> list[Point]:
        """A point for every evaluation; the retrained model is trained in the same way, once for all methods."""
        context, title = case.context, case.directory.name.replace("_", " ")
        evaluated = self._evaluations(context, lambda: case.unlearned, case.directory, case.identity, title)
        others: dict[int, list[Measurement]] = {}
        if context.load_retrained is not None:
            control = (context.load_retrained, context.directory, context.identity, f"{title} of the retrained model")
            others = self._evaluations(context, *control)
        return [Point(f"{step} steps", own, retrained=others.get(step, ())) for step, own in evaluated.items()]

    def _evaluations(
        self, context: Context, load: Callable[[], Model], directory: Path, identity: str, title: str
    ) -> dict[int, list[Measurement]]:
        """Measurements by step. A diverging run ends early, and what was measured until then is the result."""

        def evaluate(params: Any) -> list[dict[str, Any]]:
            scores = context.evaluator.score(context.original.replace(params=params), full=True)
            return [m.to_json() for m in context.evaluator.measure(scores)]

        finished = directory / "finished.json"
        if not broadcast_from_process_0(read_json(finished) == identity):
            rows: Rows = context.prepared
            sampler = epoch_sampler(len(rows), self.batch_size, seed=context.seed)
            train_on(
                load(),
                self.optimization,
                lambda step: rows.batch(sampler(step)),
                steps=self.steps,
                evaluate=evaluate,
                evaluate_every=self.evaluate_every,
                seed=context.seed,
                mesh=context.mesh,
                directory=directory,
                identity=identity,
                title=title,
            )
            write_json(finished, identity)
            remove(directory / "checkpoints")
            barrier(f"{title}: measured")  # all processes read it
        rows_of = front_rows(directory, identity)
        return {row["step"]: [decode(Measurement, m) for m in row["evaluation"]] for row in rows_of}


class Relearning(TrainingOn):
    """Training goes on, on a share of the forget rows that is drawn by the run's seed."""

    share: float = option(0.1, help="share of the forget rows that is trained on; 1 = all", minimum=0.0, maximum=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.share == 0:
            raise ConfigError("share is 0; the attack needs forget rows to train on. Give a share above 0, at most 1.")

    def prepare(self, context: Context) -> Rows:
        """The rows that are trained on."""
        rows = context.corpora.forget
        number = max(1, round(self.share * len(rows)))
        drawn = np.random.default_rng([context.seed, 5]).permutation(len(rows))[:number]
        return rows.take(np.sort(drawn))


class BenignRelearning(TrainingOn):
    """Training goes on, on text that has nothing to do with the forget set (2406.13356, 2409.18025)."""

    source: str | None = option(
        None, help="that text (`trace_jax.data.sources.read_source`); None: rows of the retain corpus, neighbours aside"
    )

    def check_source(self) -> None:
        if self.source:
            read_source(self.source)

    def prepare(self, context: Context) -> Rows:
        """The source's text in rows like those of the run; without one, retain rows that are not of neighbours."""
        if self.source is None:
            retain = context.corpora.retain
            return retain.take(np.flatnonzero(retain.domain == 0)) if (retain.domain == 0).any() else retain
        documents = encode_documents(context.codec, read_source(self.source)[0])
        return pack_documents(documents, context.data.row_length, special=context.codec.special)
