"""The shapes typed in by hand have the parameters that their authors publish."""

import dataclasses

import pytest

from trace_jax.config import ConfigError
from trace_jax.models.architecture import count_params, flat_specs
from trace_jax.models.families import PUBLISHED, published_config, shape_differences, unread_keys

# Billions of parameters, in all and active per token, as model cards and papers round them. Whether the embedding,
# which a token only looks up, is active is counted differently: "embedding" says that it is not.
SIZES = {
    "olmoe-1b-7b": (6.92, 1.28, ""),  # arXiv 2409.02060
    "qwen1.5-moe-a2.7b": (14.3, 2.7, ""),  # the model's card
    "deepseek-v2-lite": (15.7, 2.4, "embedding"),  # arXiv 2405.04434
    "mixtral-8x7b": (46.7, 12.9, ""),  # the announcement of December 2023
    "phi-3.5-moe": (41.9, 6.6, ""),  # the model's card: 16 x 3.8B, which share what is not an expert
    "qwen3-30b-a3b": (30.5, 3.3, ""),  # arXiv 2505.09388
    "gpt-oss-20b": (20.91, 3.61, "embedding"),  # arXiv 2508.10925
}


def test_every_published_model_is_counted():
    assert set(SIZES) == set(PUBLISHED)


@pytest.mark.parametrize("name", SIZES)
def test_totals_and_active_parameters_are_the_published_ones(name):
    """Totals within half a percent, active ones within 0.06 billion: they are rounded to tenths, some down."""
    config, (billions, active_billions, without) = published_config(name, dtype="bfloat16"), SIZES[name]
    total, active = count_params(config)
    active -= config.vocab_size * config.hidden_size if without else 0
    assert total / 1e9 == pytest.approx(billions, rel=0.005)
    assert active / 1e9 == pytest.approx(active_billions, abs=0.06)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_field_is_misspelt(name):
    assert not unread_keys(PUBLISHED[name])


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'mixtral' is not a model .* known: olmoe-1b-7b, .*, gpt-oss-20b\."):
        published_config("mixtral", dtype="bfloat16")


def test_differences_name_the_fields_that_decide_parameters_and_no_others():
    mixtral = published_config("mixtral-8x7b", dtype="bfloat16")
    other = dataclasses.replace(mixtral, num_experts=16, dtype="float32", norm_epsilon=1e-6)
    assert shape_differences(other, mixtral) == ["num_experts is 16, expected 8"]
    for one in PUBLISHED:
        for two in PUBLISHED:
            first, second = (published_config(name, dtype="bfloat16") for name in (one, two))
            assert bool(shape_differences(first, second)) == (flat_specs(first) != flat_specs(second))
