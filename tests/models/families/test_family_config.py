"""config.json of every family: both spellings, defaults, and what is refused."""

import json
import subprocess
import sys

import pytest
import transformers
from tiny_checkpoints import KIMI, MODEL_TYPES

from trace_jax.config import ConfigError
from trace_jax.models.architecture import count_params
from trace_jax.models.families import FAMILIES, family_of, model_config, unread_keys
from trace_jax.models.families.fields import complete

# What a class leaves open although its model needs it.
NEEDED = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2, "max_window_layers": 62},
    "glm4_moe": {"head_dim": 128},
    "hunyuan_v1_moe": {"num_experts": 64, "head_dim": 128},
}


def config_json(directory):
    return json.loads((directory / "config.json").read_text())


def read(model_type, **fields):
    return model_config({"model_type": model_type, **NEEDED.get(model_type, {}), **fields}, dtype="float32")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_both_spellings_mean_the_same(model_type, tiny_checkpoint):
    new, old = config_json(tiny_checkpoint(model_type)), config_json(tiny_checkpoint(model_type, legacy=True))
    assert new != old
    assert model_config(new, dtype="float32") == model_config(old, dtype="float32")
    assert unread_keys(new) == unread_keys(old) == ()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_have_the_defaults_of_the_class(model_type):
    full = transformers.AutoConfig.for_model(model_type, **NEEDED.get(model_type, {})).to_dict()
    assert read(model_type) == model_config(full, dtype="float32")


@pytest.mark.parametrize(
    ("model_type", "fields", "billions"),
    [
        ("mixtral", {}, 46.7),  # Mixtral-8x7B
        ("olmoe", {"intermediate_size": 1024}, 6.9),  # OLMoE-1B-7B
        ("deepseek_v3", {}, 671.0),  # DeepSeek-V3
        ("gpt_oss", {}, 116.8),  # gpt-oss-120b
    ],
)
def test_the_published_models_have_their_published_size(model_type, fields, billions):
    assert round(count_params(read(model_type, **fields))[0] / 1e9, 1) == billions


def test_the_tests_cover_the_families_and_their_other_names():
    assert set(MODEL_TYPES) - {KIMI} == set(FAMILIES)
    assert len(FAMILIES) == 23
    assert family_of({"model_type": KIMI}) is FAMILIES["deepseek_v3"]


def test_an_unknown_family_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"model_type is 'llama'; supported: afmoe, .*, qwen3_moe"):
        family_of({"model_type": "llama"})


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ("mixtral", {"vocab_size": "many"}, "transformers refuses it: .*vocab_size.*expected int"),
        ("mixtral", {"vocab_size": None}, "vocab_size.*expected int"),
        ("dots1", {"num_experts_per_tok": None}, "num_experts_per_tok is null; it is needed"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported: greedy, group"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: sigmoid"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads is 8; supported: 128"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 36}, "layer_types is 'linear_attention'; supported: slid"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window must then be at least 1"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, "sliding_window must then be at least 1"),
        ("glm4_moe_lite", {"mlp_layer_types": ["gated"] * 47}, "mlp_layer_types is 'gated'; supported: dense, sparse"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2] * 16}, "moe_topk is .*; one number for all layers is supported"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [3072] * 32}, "moe_intermediate_size is 3072; supported: 11008"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: sigmoid"),
        ("phimoe", {"num_experts_per_tok": 4}, "the sparse mixer chooses 2 experts"),
        ("mellum", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_implemented_is_refused(model_type, fields, message):
    with pytest.raises(ConfigError, match=message):
        read(model_type, **fields)


def test_keys_that_nobody_reads_are_reported():
    assert unread_keys({"model_type": "mixtral", "use_cache": True, "head_temperature": 2.0}) == ("head_temperature",)


def test_layers_follow_the_rules_of_their_families():
    assert read("ernie4_5_moe", moe_layer_interval=9, moe_layer_end_index=20).moe_layers == (8, 17)
    assert read("axk1", first_k_dense_replace=2, moe_layer_freq=20).moe_layers == (20, 40, 60)
    assert read("qwen3_moe", decoder_sparse_step=12, mlp_only_layers=[11]).moe_layers == (23,)
    exaone = read("exaone_moe", num_hidden_layers=4)
    assert (exaone.windows, exaone.layer_ropes) == ((4096, 4096, 4096, 0), (0, 0, 0, -1))
    assert read("mixtral", sliding_window=None).windows == ()
    assert read("qwen3_moe", use_sliding_window=True, sliding_window=4).windows == (4,) * 24
    afmoe = read("afmoe", num_hidden_layers=2, layer_types=["full_attention"] * 2, num_dense_layers=0)
    assert (afmoe.windows, afmoe.layer_ropes, afmoe.dense_layers) == ((), (-1, -1), ())


def test_groups_are_chosen_from_where_the_method_says_so():
    for method, groups in (("greedy", (1, 1)), ("group_limited_greedy", (8, 3))):
        config = read("deepseek_v2", topk_method=method, n_group=8, topk_group=3)
        assert (config.num_groups, config.groups_per_token) == groups
    assert read("deepseek_v2", q_lora_rank=None).query_latent_size == 0


def test_a_family_that_transformers_does_not_know_has_the_values_of_the_file():
    assert complete({"model_type": "new_moe", "a": 1}, "new_moe") == {"model_type": "new_moe", "a": 1}


def test_a_checkpoint_is_read_without_torch_and_transformers_is_imported_only_then(tiny_checkpoint):
    code = f"""
import sys
sys.modules["torch"] = None  # as where it isn't installed
import trace_jax.main, trace_jax.models.families, trace_jax.checkpoints.pretrained
assert "transformers" not in sys.modules
model = trace_jax.load_pretrained({str(tiny_checkpoint("mixtral"))!r})
assert model.config.num_experts == 8 and "transformers" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
