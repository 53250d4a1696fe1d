"""Every family computes what transformers computes (eager, float32), with right padding and rows of unequal length."""

import filecmp
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CONFIGS, LAYOUTS, MODEL_TYPES, build, save
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers_reference import MASK, TOKENS, by_expert, run

from trace_jax.checkpoints.export import save_pretrained
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.models.arrays import count_params
from trace_jax.models.decoder import forward
from trace_jax.models.families import family_of
from trace_jax.models.generate import generate

TOLERANCE = 1e-4  # of every number below, in every family
LENGTHS = np.array([11, 6, 1])  # of prompts
PROMPT = np.random.default_rng(1).integers(3, 97, (3, 11)).astype(np.int32)
NEW = 12  # tokens: beyond windows, and past the length at which long-context factors change
compute = jax.jit(forward, static_argnames=("config", "collect"))


def outputs(model, params=None, collect=("logits", "layers", "router")):
    params = model.params if params is None else params
    return compute(params, model.config, jnp.asarray(TOKENS), mask=jnp.asarray(MASK), collect=collect)


def largest_difference(ours, theirs):
    """Over real positions."""
    return float(np.abs(np.asarray(ours) - theirs)[..., MASK, :].max())


def disagreements(model, reference):
    """Largest absolute difference by name; the chosen experts must be the same."""
    output = outputs(model)
    indices, weights = by_expert(np.asarray(output.router.indices), np.asarray(output.router.weights))
    their_indices, their_weights = by_expert(reference.router(2), reference.router(1))
    assert np.array_equal(indices[:, MASK], their_indices[:, MASK])
    return {
        "router_logits": largest_difference(output.router.logits, reference.router(0)),
        "weights": largest_difference(weights, their_weights),
        "layers": largest_difference(output.layers, reference.layers),
        "logits": largest_difference(output.logits, reference.logits),
    }


def unfelt_parameters(model, reference):
    """Parameters that could be another value without the logits telling."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.params)
    unfelt = []
    for place, (path, leaf) in enumerate(leaves):
        changed = [array * 0 if at == place else array for at, (_, array) in enumerate(leaves)]
        moved = outputs(model, jax.tree.unflatten(structure, changed)).logits
        if largest_difference(moved, reference.logits) < 100 * TOLERANCE:
            unfelt.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        assert leaf.size
    return unfelt


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_equals_transformers(model_type, tiny_model, tiny_checkpoint, imported, record_family):
    reference = run(tiny_model(model_type))
    assert 0.5 < reference.logits[MASK].std() < 4  # ordinary logits, or small differences would say little
    model, fused = imported(model_type), load_pretrained(tiny_checkpoint(model_type, "fused"))
    differences = disagreements(model, reference)
    assert max(differences.values()) <= TOLERANCE, differences
    jax.tree.map(np.testing.assert_array_equal, fused.params, model.params)
    assert unfelt_parameters(model, reference) == []
    assert count_params(model.config)[0] == sum(p.numel() for p in all_arrays(tiny_model(model_type)))
    record_family(
        model_type,
        {
            "title": family_of({"model_type": model_type}).title,
            "differences": differences,
            "layouts": LAYOUTS,
            "transformers": transformers.__version__,
        },
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_equal_those_of_transformers(model_type, tiny_model, imported):
    """For prompts of unequal length: ours on the right of their padding, theirs on the left."""
    model, longest = imported(model_type), PROMPT.shape[1]
    got = generate(model.params, model.config, PROMPT, lengths=LENGTHS, max_new_tokens=NEW)
    places = np.arange(longest) - (longest - LENGTHS)[:, None]
    ids = np.where(places >= 0, np.take_along_axis(PROMPT, np.maximum(places, 0), axis=1), 0)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    mask = torch.tensor((places >= 0).astype(np.int64))
    theirs = tiny_model(model_type).generate(torch.tensor(ids), attention_mask=mask, **settings)
    np.testing.assert_array_equal(got, theirs.numpy()[:, longest:])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_export_gives_back_the_files_and_merges_bit_by_bit(model_type, tiny_checkpoint, imported, tmp_path):
    """Also where every parameter is another array than the import's, so that all numbers are compared."""
    directory, model = tiny_checkpoint(model_type), imported(model_type)
    names = [file.name for file in directory.iterdir()]
    assert {"config.json", "model.safetensors"} <= set(names)
    copied = model.replace(params=jax.tree.map(jnp.array, model.params))
    for number, exported in enumerate((model, copied)):
        save_pretrained(exported, tmp_path / str(number))
        assert filecmp.cmpfiles(directory, tmp_path / str(number), names, shallow=False) == (names, [], [])


SHORT = {**CONFIGS["phimoe"]["rope_parameters"], "original_max_position_embeddings": 32}
OTHERS = {
    "no window, tied": ("mixtral", {"sliding_window": None, "tie_word_embeddings": True}),
    "window everywhere": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "norm_topk_prob": False}),
    "greedy, queries without latent": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "no rope, no dense layer": ("afmoe", {"layer_types": ["full_attention"] * 2, "num_dense_layers": 0}),
    "short text": ("phimoe", {"rope_parameters": SHORT, "lm_head_bias": False}),
}


@pytest.mark.parametrize(("model_type", "changes"), OTHERS.values(), ids=OTHERS)
def test_other_switches_equal_transformers(model_type, changes, tmp_path):
    theirs = build(model_type, **changes)
    model = load_pretrained(save(theirs, model_type, tmp_path))
    differences = disagreements(model, run(theirs))
    assert max(differences.values()) <= TOLERANCE, differences


def test_gpt_oss_as_published_in_mxfp4(tmp_path):
    theirs = build("gpt_oss", hidden_size=64, intermediate_size=32)
    directory = save(theirs, "gpt_oss", tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "mxfp4"}}))
    tensors, random = load_file(directory / "model.safetensors"), np.random.default_rng(0)
    for name, weights in theirs.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensors.pop(name).shape
            blocks = random.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
            scales = random.integers(121, 125, blocks.shape[:3], dtype=np.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            packed = torch.tensor(blocks), torch.tensor(scales)
            weights.copy_(convert_moe_packed_tensors(*packed, dtype=torch.float32))
    save_file(tensors, directory / "model.safetensors")
    differences = disagreements(load_pretrained(directory), run(theirs))
    assert max(differences.values()) <= TOLERANCE, differences


def all_arrays(model):
    """Parameters and saved buffers, each once."""
    return {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
