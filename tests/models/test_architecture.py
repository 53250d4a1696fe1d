"""One declaration per array: abstract tree, axes and first values can't disagree."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.models.architecture import ModelConfig, abstract_params, count_params, flat_specs, init_params

CONFIG = ModelConfig(
    vocab_size=40, num_layers=3, num_experts=4, shared_hidden_size=24, num_heads=4, num_kv_heads=2, head_size=16
)


def test_first_values_have_the_declared_shapes_and_types():
    for config in (CONFIG, dataclasses.replace(CONFIG, dtype="bfloat16", tie_embeddings=True, shared_hidden_size=0)):
        params = init_params(config, jax.random.key(0))
        got = jax.tree.map(lambda a: (a.shape, a.dtype), params)
        assert got == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(config))
        assert ("head" in params) == (not config.tie_embeddings)
        assert ("shared" in params["layers"]) == bool(config.shared_hidden_size)
        assert params["layers"]["router"].dtype == jnp.float32
        for path, spec in flat_specs(config).items():
            assert len(spec.shape) == len(spec.axes), path
            assert (spec.axes[0] == "layers") == path.startswith("layers/"), path


def test_first_values_depend_on_the_seed_alone():
    a, b, c = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embed"], c["embed"])
    assert not np.array_equal(a["layers"]["q"], a["layers"]["o"].reshape(a["layers"]["q"].shape))


def test_projections_start_at_one_over_the_root_of_their_inputs():
    params = init_params(CONFIG, jax.random.key(0))
    np.testing.assert_allclose(np.std(params["layers"]["experts"]["gate_up"]), CONFIG.hidden_size**-0.5, rtol=0.05)
    expected = (CONFIG.expert_hidden_size * 2 * CONFIG.num_layers) ** -0.5
    np.testing.assert_allclose(np.std(params["layers"]["experts"]["down"]), expected, rtol=0.05)
    assert np.all(np.asarray(params["final_norm"]) == 1)


def test_counts_of_parameters():
    total, active = count_params(CONFIG)
    params = init_params(CONFIG, jax.random.key(0))
    assert total == sum(math.prod(a.shape) for a in jax.tree.leaves(params))
    routed = sum(math.prod(a.shape) for a in jax.tree.leaves(params["layers"]["experts"]))
    assert total - active == routed // 2  # 2 of 4 experts
