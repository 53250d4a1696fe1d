"""Rotary settings of config.json: frequencies and amplitudes against transformers' own."""

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1RotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from trace_jax.config import ConfigError
from trace_jax.models.families import model_config
from trace_jax.models.layers import frequencies

LONG = {"factor": 8.0, "original_max_position_embeddings": 512}
SETTINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
    "yarn": {"rope_type": "yarn", **LONG},
    "yarn, not truncated": {"rope_type": "yarn", "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0, **LONG},
    "yarn, two mscales": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.2, **LONG},
    "yarn, one mscale": {"rope_type": "yarn", "mscale": 0.7, **LONG},
    "yarn, its own amplitude": {"rope_type": "yarn", "attention_factor": 1.3, **LONG},
    "yarn, factor from the lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    "yarn, all pairs alike": {"rope_type": "yarn", "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False, **LONG},
}


def read(model_type, **fields):
    return model_config({"model_type": model_type, **fields}, dtype="float32")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frequencies_and_amplitude_are_those_of_transformers(settings):
    fields = {"rope_parameters": {"rope_theta": 5e5, **settings}, "head_dim": 64, "max_position_embeddings": 4096}
    theirs, amplitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](transformers.MixtralConfig(**fields))
    (rope,) = read("mixtral", **fields).ropes
    np.testing.assert_allclose(frequencies(rope, 64), theirs.numpy(), rtol=2e-6)
    assert rope.amplitude == pytest.approx(amplitude)


def test_old_spelling_means_the_same():
    scaling = {"type": "yarn", **LONG}
    new = read("mixtral", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **LONG})
    assert read("mixtral", rope_theta=5e5, rope_scaling=scaling) == new
    beside = {"type": "yarn", "factor": 8.0}
    assert read("mixtral", rope_theta=5e5, rope_scaling=beside, original_max_position_embeddings=512) == new


def test_part_of_a_head_turns():
    assert read("glm4_moe", head_dim=64).rotary_size == 32
    assert read("glm4_moe", head_dim=64, partial_rotary_factor=0.25).rotary_size == 16
    assert read("minimax_m2", rotary_dim=64).rotary_size == 64
    assert read("minimax_m2", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}).rotary_size == 32
    assert read("minimax_m2").rotary_size == 0


def test_alpha_of_hunyuan_changes_the_base():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    config = transformers.AutoConfig.for_model("hunyuan_v1_moe", rope_parameters=rope, head_dim=128)
    theirs = HunYuanMoEV1RotaryEmbedding(config).inv_freq.numpy()
    (ours,) = read("hunyuan_v1_moe", rope_parameters=rope, head_dim=128).ropes
    np.testing.assert_allclose(frequencies(ours, 128), theirs, rtol=2e-6)


@pytest.mark.parametrize("length", [8, 40])
def test_long_texts_change_the_amplitude_of_phi(length):
    import torch

    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0],
        "short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": 16,
    }  # fmt: skip
    fields = {"rope_parameters": rope, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.AutoConfig.for_model("phimoe", **fields)
    cos, _ = PhimoeRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    (ours,) = read("phimoe", **fields).ropes
    amplitude = ours.long_amplitude if length > ours.original_length else ours.amplitude
    expected = amplitude * np.cos(np.arange(length)[:, None] * frequencies(ours, 4))
    np.testing.assert_allclose(cos[0, :, :2].numpy(), expected, atol=1e-5)


def test_yarn_scales_the_scores_of_latent_attention():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 0.9, **LONG}
    attention = DeepseekV3Attention(
        transformers.DeepseekV3Config(rope_parameters=rope, hidden_size=64, num_attention_heads=2), layer_idx=0
    )
    assert read("deepseek_v3", rope_parameters=rope).attention_scale == pytest.approx(attention.scaling)


def test_layers_of_different_kinds_turn_differently():
    kinds = ["full_attention", "sliding_attention"] * 14
    config = read("mellum", layer_types=kinds)
    assert [rope.theta for rope in config.ropes] == [5e5, 1e4]
    assert config.layer_ropes == (0, 1) * 14
    assert [rope.theta for rope in read("mellum").ropes] == [5e5]


@pytest.mark.parametrize(
    ("model_type", "rope", "message"),
    [
        ("mixtral", {"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'; supported: default, linear"),
        ("mixtral", {"rope_type": "proportional"}, "rope_type is 'proportional'; supported"),
        ("mixtral", {"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ("mixtral", {"rope_type": "default", "mrope_section": [1, 2]}, "rope_parameters is 'mrope_section'"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
        ("hunyuan_v1_moe", {"rope_type": "dynamic", "factor": 2.0}, "dynamic without alpha"),
        ("phimoe", {"rope_type": "linear", "factor": 2.0, "short_mscale": 1.0, "long_mscale": 1.0}, "'linear'"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_other_rotary_settings_are_refused(model_type, rope, message):
    with pytest.raises(ConfigError, match=message):
        read(model_type, rope_parameters=rope)
