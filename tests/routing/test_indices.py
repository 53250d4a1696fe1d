"""Routing by any function is counted as a model's is, and what is no routing is refused."""

import jax
import numpy as np
import pytest

from tests import tiny
from trace_jax.models.decoder import forward
from trace_jax.routing.config import CalibrationConfig, select_experts
from trace_jax.routing.statistics import expert_assignments, expert_statistics
from trace_jax.routing.weights import retain_weights

ONE = tiny.mesh_of(1, 1, 1)


def test_a_function_of_the_model_gives_what_the_model_gives(tiny_model, corpora):
    """Also where rows hold several documents, which the function never sees together."""

    @jax.jit
    def route(tokens):
        return forward(tiny_model.params, tiny_model.config, tokens, collect=("indices",)).router.indices

    rows = corpora["retain"]
    assert rows.segments.max() == 2
    by_model, by_function = {"mesh": ONE}, {"num_experts": 4}
    for batch_size in (9, 24):
        one = expert_statistics(tiny_model, rows, batch_size=batch_size, **by_model)
        other = expert_statistics(route, rows, batch_size=batch_size, **by_function)
        assert np.array_equal(one.counts, other.counts) and other.counts.dtype == np.int64
        assert (one.tokens, one.top_k) == (other.tokens, other.top_k)
        one, again = expert_assignments(tiny_model, rows, **by_model), expert_assignments(route, rows, **by_function)
        for name in ("indices", "rows", "documents"):
            assert np.array_equal(getattr(one, name), getattr(again, name))
    with pytest.raises(ValueError, match="'affinity' needs gate weights"):
        select_experts(other, other, rule="affinity", top=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(np.float32), r"gave float32 \[1, 4, 12, 2\]; expected .* as integers \[layers, 4, 12, exp"),
        (lambda x: x[0], r"of tokens \[4, 12\] the function gave int64 \[4, 12, 2\]"),
        (lambda x: x[:, :3], r"gave int64 \[1, 3, 12, 2\]"),
        (lambda x: x[..., :0], r"gave int64 \[1, 4, 12, 0\]"),
        (lambda x: x + 3, r"layer 0, valid token 0 of a batch: the experts are \[3, 4\]; there are 4, from 0"),
        (lambda x: x - 1, r"the experts are \[-1, 0\]; there are 4"),
        (lambda x: np.zeros_like(x), r"the experts are \[0, 0\]; those of a token are distinct"),
        (lambda x: {"indices": x}, r"gave object \[\]"),
    ],
)
def test_what_is_no_routing_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        expert_statistics(lambda tokens: change(np.stack([tokens * 0, tokens * 0 + 1], -1)[None].astype(int)),
                          tiny.make_rows(4), num_experts=4)  # fmt: skip


def test_answers_that_change_and_settings_that_do_not_go_together_are_refused(tiny_model):
    answers = iter([1, 2])
    with pytest.raises(
        ValueError, match=r"gave int64 \[2, 4, 12, 2\]; expected .* integers \[1, 4, 12, 2\], as before"
    ):
        expert_assignments(
            lambda tokens: np.tile(np.arange(2), (next(answers), *tokens.shape, 1)), tiny.make_rows(4), num_experts=4
        )
    for weighting in ("hidden", {"name": "matching", "rule": {"name": "sensitivity", "top": 1}}):
        with pytest.raises(ValueError, match=r"'(hidden|sensitivity)' looks into the model"):
            rows, config = tiny.make_rows(4), CalibrationConfig(weighting)
            retain_weights(config, model=len, num_experts=4, forget=rows, retain=rows)
    for model, given in ((tiny_model, {"num_experts": 4}), (len, {}), (len, {"num_experts": 4, "mesh": ONE})):
        with pytest.raises(ValueError, match="with a function give num_experts and no mesh"):
            expert_statistics(model, tiny.make_rows(4), **given)
