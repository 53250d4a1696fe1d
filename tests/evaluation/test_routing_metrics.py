"""Routing metrics of an unlearned model are counted on the same tokens as the original's."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.evaluation.routing import measure_routing
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model


@pytest.fixture(scope="module")
def corpora(tiny):
    return {"forget": tiny.make_rows(8, seed=1), "retain": tiny.make_rows(8, seed=2)}


def test_a_model_next_to_itself_has_not_moved(tiny, corpora):
    model = Model(tiny.config, tiny.params)
    found = measure_routing(model, model, **corpora, batch_size=8)
    for subject in ("forget", "retain"):
        assert (found.jaccard[subject] == 1).all() and (found.unchanged[subject] == 1).all()
        assert found.tokens[subject] == corpora[subject].valid.sum()
    assert (found.drift == 0).all()
    assert (found.gap == found.original_gap).all()


def test_metrics_equal_a_plain_count(tiny, corpora):
    other = tiny.make_params(3)
    found = measure_routing(Model(tiny.config, tiny.params), Model(tiny.config, other), **corpora, batch_size=8)
    rows = corpora["forget"]
    before, after = (
        np.asarray(forward(p, tiny.config, rows.tokens, mask=rows.segments, collect=("indices",)).router.indices)
        for p in (tiny.params, other)
    )
    for layer in range(2):
        pairs = [(set(b), set(a)) for b, a in zip(before[layer][rows.valid], after[layer][rows.valid], strict=True)]
        assert found.jaccard["forget"][layer] == pytest.approx(np.mean([len(a & b) / len(a | b) for b, a in pairs]))
        assert found.unchanged["forget"][layer] == pytest.approx(np.mean([a == b for b, a in pairs]))
        used = np.mean([[e in a for e in range(4)] for _, a in pairs], axis=0)
        assert found.frequency["forget"][layer] == pytest.approx(used)
        assert found.dead["forget"][layer] == (used == 0).sum()
    assert (found.drift > 0.1).all()
    json.dumps(found.to_json(), allow_nan=False)


def test_a_router_that_sends_everything_one_way_leaves_experts_dead(tiny, corpora):
    layers = tiny.params["layers"]
    biased = {**tiny.params, "layers": {**layers, "router": jnp.zeros_like(layers["router"])}}  # ties: the first K
    found = measure_routing(Model(tiny.config, tiny.params), Model(tiny.config, biased), **corpora, batch_size=8)
    assert found.dead["retain"].tolist() == [2, 2]
    assert found.load_entropy["retain"] == pytest.approx([np.log(2) / np.log(4)] * 2)
    assert (found.gap == 0).all() and found.drift == pytest.approx([1, 1])
