"""config.json of every family and of published models: both spellings, defaults, rotary settings, what is refused."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from tiny_checkpoints import KIMI, MODEL_TYPES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trace_jax.config import ConfigError
from trace_jax.models import families
from trace_jax.models.architecture import count_params, flat_specs
from trace_jax.models.families import FAMILIES, PUBLISHED, family_of, model_config, shape_differences, unread_keys
from trace_jax.models.layers import frequencies

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


def rope(**settings):
    return {"rope_parameters": settings}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_both_spellings_mean_the_same(model_type, tiny_checkpoint):
    new, old = config_json(tiny_checkpoint(model_type)), config_json(tiny_checkpoint(model_type, legacy=True))
    assert new != old
    assert model_config(new, dtype="float32") == model_config(old, dtype="float32")
    assert unread_keys(new) == unread_keys(old) == ()


def test_the_defaults_of_a_class_are_those_of_a_published_model():
    billions = [round(count_params(read(model_type))[0] / 1e9, 1) for model_type in ("deepseek_v3", "gpt_oss")]
    assert billions == [671.0, 116.8]  # DeepSeek-V3, gpt-oss-120b


def test_the_tests_cover_the_families_and_their_other_names():
    assert set(MODEL_TYPES) - {KIMI} == set(FAMILIES)
    assert len(FAMILIES) == 23
    assert family_of({"model_type": KIMI}) is FAMILIES["deepseek_v3"]


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {}, "model_type is 'llama'; supported: afmoe, .*, qwen3_moe"),
        (
            "deepseek_v3",
            {"num_hidden_layers": 2**40},
            "num_hidden_layers is 1,099,511,627,776; expected at most 262,144",
        ),
        ("mixtral", {"num_local_experts": 2**17}, "it has 4,194,304 experts; expected at most 262,144"),
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
        ("mixtral", rope(rope_type="dynamic", factor=2.0), "rope_type is 'dynamic'; supported: default, linear"),
        ("mixtral", rope(rope_type="proportional"), "rope_type is 'proportional'; supported"),
        ("mixtral", rope(rope_type="llama3", factor=2.0), "low_freq_factor"),
        ("mixtral", rope(rope_type="default", mrope_section=[1, 2]), "rope_parameters is 'mrope_section'"),
        ("mixtral", rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; supported: 1.0"),
        ("hunyuan_v1_moe", rope(rope_type="dynamic", factor=2.0), "dynamic without alpha"),
        ("phimoe", rope(rope_type="linear", factor=2.0, short_mscale=1.0, long_mscale=1.0), "'linear'"),
        ("deepseek_v3", rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
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


# --- rotary settings

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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frequencies_and_amplitude_are_those_of_transformers(settings):
    fields = {"rope_parameters": {"rope_theta": 5e5, **settings}, "head_dim": 64, "max_position_embeddings": 4096}
    theirs, amplitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](transformers.MixtralConfig(**fields))
    (rope,) = read("mixtral", **fields).ropes
    np.testing.assert_allclose(frequencies(rope, 64), theirs.numpy(), rtol=2e-6)
    assert rope.amplitude == pytest.approx(amplitude)


def test_the_original_length_may_stand_beside():
    new = read("mixtral", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **LONG})
    scaling = {"type": "yarn", "factor": 8.0}
    assert read("mixtral", rope_theta=5e5, rope_scaling=scaling, original_max_position_embeddings=512) == new


def test_part_of_a_head_turns():
    assert read("glm4_moe", head_dim=64).rotary_size == 32
    assert read("glm4_moe", head_dim=64, partial_rotary_factor=0.25).rotary_size == 16
    assert read("minimax_m2", rotary_dim=64).rotary_size == 64
    assert read("minimax_m2", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}).rotary_size == 32
    assert read("minimax_m2").rotary_size == 0


def test_layers_of_different_kinds_turn_differently():
    kinds = ["full_attention", "sliding_attention"] * 14
    config = read("mellum", layer_types=kinds)
    assert [rope.theta for rope in config.ropes] == [5e5, 1e4]
    assert config.layer_ropes == (0, 1) * 14
    assert [rope.theta for rope in read("mellum").ropes] == [5e5]


# --- published models

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_and_active_parameters_are_the_published_ones_and_no_field_is_misspelt(name):
    """Totals within half a percent, active ones within 0.06 billion: they are rounded to tenths, some down."""
    config, (billions, active_billions, without) = model_config(PUBLISHED[name], dtype="bfloat16"), SIZES[name]
    total, active = count_params(config)
    active -= config.vocab_size * config.hidden_size if without else 0
    assert total / 1e9 == pytest.approx(billions, rel=0.005)
    assert active / 1e9 == pytest.approx(active_billions, abs=0.06)
    assert not unread_keys(PUBLISHED[name])


def test_differences_name_the_fields_that_decide_parameters_and_no_others():
    mixtral = model_config(PUBLISHED["mixtral-8x7b"], dtype="bfloat16")
    other = dataclasses.replace(mixtral, num_experts=16, dtype="float32", norm_epsilon=1e-6)
    assert shape_differences(other, mixtral) == ["num_experts is 16, expected 8"]
    for one in PUBLISHED:
        for two in PUBLISHED:
            first, second = (model_config(PUBLISHED[name], dtype="bfloat16") for name in (one, two))
            assert bool(shape_differences(first, second)) == (flat_specs(first) != flat_specs(second))


# --- the table of docs/models.md

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "models_table.py"))


def cells(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]


def test_the_committed_table_lists_the_registry():
    page = (ROOT / "docs" / "models.md").read_text()
    _, *rows = cells(page.split(SCRIPT["BEGIN"])[1].split(SCRIPT["END"])[0])
    assert [row[0].strip("`") for row in rows[1:]] == [*FAMILIES, *families.ALIASES]
    assert all(float(difference) <= 1e-4 for row in rows[1:] for difference in row[-4:])


def test_the_table_is_written_from_the_record():
    differences = {name: 10.0**-place for place, name in enumerate(SCRIPT["MEASURES"], 4)}
    record = {"layouts": ["original"], "transformers": "5.0", "differences": differences}
    text = SCRIPT["table"](dict.fromkeys([*FAMILIES, *families.ALIASES], record))
    first, family = cells(text)[2], next(iter(FAMILIES.values()))
    numbers = ["1e-04", "1e-05", "1e-06", "1e-07"]
    assert first == [f"`{family.model_type}`", family.title, family.published, "original", *numbers]
    assert text.endswith("transformers 5.0.\n")
