"""Every family computes what transformers computes (eager, float32), with right padding and rows of unequal length."""

import filecmp
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_checkpoints import LAYOUTS, LENGTH, MODEL_TYPES

from trace_jax.checkpoints.export import save_pretrained
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.models import decoder
from trace_jax.models.architecture import count_params, flatten, unflatten
from trace_jax.models.families import family_of
from trace_jax.models.generate import generate

TOLERANCE = 1e-4  # of every number below, in every family
MASK = np.arange(LENGTH)[None] < np.array([LENGTH, 17, 9, 3])[:, None]
TOKENS = np.where(MASK, np.random.default_rng(0).integers(3, 97, MASK.shape), 0).astype(np.int32)
# One family for each way of reading with a cache: windows, sinks, latents, another amplitude for long texts, layers
# without position and a gate. That each switch gives the same with a cache as without, tests/models says.
DECODED = ("mixtral", "gpt_oss", "deepseek_v3", "phimoe", "afmoe")
LENGTHS = np.array([11, 6, 1])  # of prompts
PROMPT = np.random.default_rng(1).integers(3, 97, (3, 11)).astype(np.int32)
NEW = 20  # tokens: beyond windows and a chunk, and past the length at which long-context factors change


@functools.partial(jax.jit, static_argnames="config")
def compute(params, config):
    return decoder.forward(params, config, TOKENS, mask=MASK, collect=("logits", "layers", "router"))


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    monkeypatch.setattr(decoder, "UNROLLED_LAYERS", 1)


@pytest.fixture(scope="module")
def imported(tiny_checkpoint):
    """imported(model_type): its tiny checkpoint as our model, read once."""
    return functools.cache(lambda model_type: load_pretrained(tiny_checkpoint(model_type)))


def run_reference(model):
    """What transformers computes: logits [B,S,V], layers [L,B,S,D], and the routers' logits, weights and indices."""
    calls = {"DecoderLayer": [], "Router": [], "Gate": []}
    handles = [
        module.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[-1]))
        for module in model.modules()
        for name, outputs in calls.items()
        if type(module).__name__.endswith(name)
    ]
    logits = model(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK.astype(int))).logits
    for handle in handles:
        handle.remove()
    layers = [(output[0] if isinstance(output, tuple) else output).numpy() for output in calls["DecoderLayer"]]
    computed = {"logits": logits.numpy(), "layers": np.stack(layers)}
    # Granite's of transformers 5.20 gives the indices first.
    told = [o if o[0].is_floating_point() else o[::-1] for o in calls["Router"] + calls["Gate"]]
    for part, name in enumerate(("router_logits", "weights", "indices")):
        computed[name] = np.stack([output[part].reshape(*MASK.shape, -1).numpy() for output in told])
    return computed


def by_expert(indices, *arrays):
    """All with the chosen experts in ascending order: transformers leaves their order open."""
    order = np.argsort(indices, axis=-1)
    return [np.take_along_axis(array, order, -1) for array in (indices, *arrays)]


def largest_difference(ours, theirs):
    """Over real positions."""
    return float(np.abs(np.asarray(ours) - theirs)[..., MASK, :].max())


def is_felt(path, model, logits):
    """Whether the logits tell when a parameter is zero."""
    flat = flatten(model.params)
    changed = unflatten(flat | {path: np.zeros(flat[path].shape, flat[path].dtype)})
    return largest_difference(compute(changed, model.config).logits, logits) >= 100 * TOLERANCE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_equals_transformers(model_type, tiny_model, tiny_checkpoint, imported, request):
    theirs = run_reference(tiny_model(model_type))
    assert 0.5 < theirs["logits"][MASK].std() < 4  # ordinary logits, or small differences would say little
    model, fused = imported(model_type), load_pretrained(tiny_checkpoint(model_type, "fused"))
    jax.tree.map(np.testing.assert_array_equal, fused.params, model.params)
    output = compute(model.params, model.config)
    indices, weights = by_expert(np.asarray(output.router.indices), np.asarray(output.router.weights))
    their_indices, their_weights = by_expert(theirs["indices"], theirs["weights"])
    layers = [largest_difference(a, b) for a, b in zip(output.layers, theirs["layers"], strict=True)]
    assert max(layers) <= TOLERANCE, layers
    assert np.array_equal(indices[:, MASK], their_indices[:, MASK])
    differences = {
        "router_logits": largest_difference(output.router.logits, theirs["router_logits"]),
        "weights": largest_difference(weights, their_weights),
        "layers": max(layers),
        "logits": largest_difference(output.logits, theirs["logits"]),
    }
    assert max(differences.values()) <= TOLERANCE, differences
    assert [path for path in flatten(model.params) if not is_felt(path, model, theirs["logits"])] == []
    arrays = {tensor.data_ptr(): tensor for tensor in tiny_model(model_type).state_dict().values()}  # each once
    assert count_params(model.config)[0] == sum(array.numel() for array in arrays.values())
    if directory := request.config.getoption("--record-families"):  # for docs/models.md (scripts/models_table.py)
        record = {"title": family_of({"model_type": model_type}).title, "differences": differences, "layouts": LAYOUTS}
        record["transformers"] = transformers.__version__
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, f"{model_type}.json").write_text(json.dumps(record, indent=2) + "\n")


@pytest.mark.parametrize("model_type", DECODED)
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
    copied = model.replace(params=jax.tree.map(lambda array: jax.device_put(np.array(array)), model.params))
    for number, exported in enumerate((model, copied)):
        save_pretrained(exported, tmp_path / str(number))
        assert filecmp.cmpfiles(directory, tmp_path / str(number), names, shallow=False) == (names, [], [])
