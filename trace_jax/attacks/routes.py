"""Route search: is there a way through the unlearned model's experts that leads to the forgotten answer?

After F-SOUR (2602.08621; docs/evaluation.md says what differs): token by token of the prompt and layer by layer, random
choices of experts are tried, and the one that makes the answer likeliest is kept. A search that optimises towards a
text finds some of any text; so each option of a question is searched for in the same way, and so it is in a model that
never knew. Only what the right option gains beyond the wrong ones, and beyond that model, was there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trace_jax.attacks.attack import Attack, Case, Context, Point
from trace_jax.config import fingerprint, option
from trace_jax.data.corpora import Questions
from trace_jax.evaluation.intervals import Measurement, bootstrap_mean, named
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.probes import QuestionAccuracy
from trace_jax.evaluation.task import SPLIT, Evaluator, ScoreStore, TaskScores
from trace_jax.io.progress import say, tracked
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.models.sharding import map_batches
from trace_jax.parallel.mesh import as_varying, varying_axes


class RouteSearch(Attack):
    """For every option of a question a search for the experts, of each of the prompt's tokens in each layer, that make
    it likeliest; the choice is the option that the same search makes the likeliest.
    """

    tries: int = option(10, help="random choices of experts for each token and layer", minimum=1)
    questions: int = option(48, help="most questions, spread evenly", minimum=1)

    def prepare(self, context: Context) -> Evaluator | None:
        """What measures the forget questions of the test split; None where there are none."""
        evaluator, key = context.evaluator, (SPLIT, "forget")
        for task in evaluator.tasks:
            if isinstance(task, QuestionAccuracy) and key in task.data:
                chosen = spread_indices(len(task.data[key]), self.questions)
                asked = Questions(*(array[chosen] for array in vars(task.data[key]).values()))
                identity = fingerprint(task.identity, self.tries, self.questions, context.seed)
                search = SearchedRoutes({key: asked}, identity, task.accuracies, self.tries, context.seed)
                return Evaluator(evaluator.config, (search,), evaluator.mesh, evaluator.seed)
        say("route search: there are no questions whose answers could be searched for")

    def points(self, case: Case) -> list[Point]:
        """One point, beside what the same search finds in the original and in the retrained model."""
        context, evaluator = case.context, case.context.prepared
        if evaluator is None:
            return []

        def measured(model: Model, of: Case | Context, name: str) -> list[Measurement]:
            store = ScoreStore(of.directory / name, of.identity)
            return evaluator.measure(evaluator.score(model, full=True, store=store))

        never_knew = () if context.load_retrained is None else measured(context.load_retrained(), context, "retrained")
        original = measured(context.original, context, "original")
        at = f"{self.tries} tries a token and layer"
        return [Point(at, measured(case.unlearned, case, "unlearned"), original, never_knew)]


@dataclasses.dataclass(frozen=True)
class SearchedRoutes(QuestionAccuracy):
    """The questions, each option scored along the route that a search towards it has found."""

    tries: int
    seed: int
    name = "routes"

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """`log_likelihood` f64 [Q, O] at the end of the search and, `before`, along the model's own routes, nats."""
        params, arrays = model.unguided("a search over routes"), {}
        for (split, subject), own in self.data.items():
            count, options, _ = own.tokens.shape
            most = max(1, int(own.scored.sum(axis=2).max()))
            positions = np.argsort(~own.scored, axis=2, kind="stable")[:, :, :most]
            following = np.roll(own.tokens, -1, axis=2)
            targets, counted = (np.take_along_axis(x, positions, axis=2) for x in (following, own.scored))
            prompts = own.scored.argmax(axis=2)[:, :, None] + 1  # its last token predicts the option's first
            numbers = np.broadcast_to(np.arange(count)[:, None, None], prompts.shape)  # all options get the same tries
            columns = (own.tokens, own.segments, positions, targets, counted, prompts, numbers)
            columns = [column.reshape(count * options, -1).astype(np.int32) for column in columns]
            starts = range(0, count * options, batch_size)
            batches = ([x[start : start + batch_size] for x in columns] for start in starts)
            static = (int(prompts.max()), self.tries, self.seed)
            passes = map_batches(search, params, model.config, batches, mesh=mesh, static=static)
            found = [x[:batch_size] for x in tracked(passes, "route search", len(starts))]
            before, after = np.moveaxis(np.concatenate(found)[: count * options], 1, 0).astype(np.float64)
            arrays[f"{split}/{subject}/log_likelihood"] = after.reshape(count, options)
            arrays[f"{split}/{subject}/before"] = before.reshape(count, options)
        return TaskScores(arrays)

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        """The accuracy, and by how many nats the search made right and wrong options likelier, per question."""
        measurements = super().measure(scores, original=original, retrained=retrained, **resampling)
        for (split, subject), own in self.data.items():
            after, before = (scores.arrays[f"{split}/{subject}/{name}"] for name in ("log_likelihood", "before"))
            right = np.arange(after.shape[1]) == own.answer[:, None]
            for name, options in (("right", right), ("wrong", ~right)):
                gain = np.where(options, after - before, 0.0).sum(axis=1) / options.sum(axis=1)
                interval = bootstrap_mean(gain, groups=own.group, **resampling)
                measurements.append(named(f"route_gain_{name}", split, interval, "nats"))
        return measurements


def search(
    params: Any, config: ModelConfig, tokens, segments, positions, targets, counted, prompts, numbers,
    places: int, tries: int, seed: int,
) -> jax.Array:  # fmt: skip
    """f32 [B, 2]: log-likelihood of `targets` [B, M] after `positions` of each row, along the model's own routes and
    along the best that were found for its first `prompts` [B, 1] tokens, at most `places`; other tokens choose for
    themselves. What is drawn depends on `numbers` [B, 1] and `seed`.
    """
    layers, top_k = len(config.moe_layers), config.experts_per_token

    def likelihood(experts: jax.Array) -> jax.Array:
        hidden: Any = forward(params, config, tokens, mask=segments, collect=("hidden",), experts=experts).hidden
        nll = token_nll(params, config, jnp.take_along_axis(hidden, positions[:, :, None], axis=1), targets)
        return -jnp.where(counted != 0, nll, 0.0).sum(axis=1)

    def draw(number: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
        return jax.lax.top_k(jax.random.uniform(key, (config.num_experts,)), top_k)[1]

    def attempt(state: tuple[jax.Array, jax.Array], step: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        experts, best = state
        place, layer = step // tries // layers, step // tries % layers
        drawn = jax.vmap(draw, (0, None))(numbers[:, 0], step)
        trial = experts.at[layer, :, place].set(drawn)
        found = likelihood(trial)
        better = (found > best) & (place < prompts[:, 0])
        return (jnp.where(better[None, :, None, None], trial, experts), jnp.where(better, found, best)), None

    own = as_varying(jnp.full((layers, *tokens.shape, top_k), -1, jnp.int32), varying_axes(tokens))
    before = likelihood(own)
    (_, after), _ = jax.lax.scan(attempt, (own, before), jnp.arange(places * layers * tries))
    return jnp.stack([before, after], axis=1)
