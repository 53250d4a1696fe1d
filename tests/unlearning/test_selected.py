"""Training a few experts is training all of them with the updates of the others masked, at a fraction of the memory."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from trace_jax.models.arrays import flatten, init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, make_mesh, place, to_host
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants
from trace_jax.unlearning.step import row_multiple, set_up, unlearning_step
from trace_jax.unlearning.trainable import trainable_paths
from trace_jax.unlearning.trained import merge, selected_index, split
from trace_jax.unlearning.unlearn import unlearn

MODEL = ModelConfig(
    vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_size=8, num_experts=6,
    experts_per_token=2, expert_hidden_size=6,
)  # fmt: skip
SELECTED = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
SHARED = UnlearningConfig(retain_loss="kl", alpha=2.0, learning_rate=0.01, weight_decay=0.1, clip_norm=0.5)
CONFIG = dataclasses.replace(SHARED, trainable="selected_experts")


def test_index_has_as_many_places_as_the_fullest_layer():
    assert selected_index(SELECTED).tolist() == [[1, 4], [5, 6]]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (4, 2)])
def test_rows_split_off_and_merged_are_where_they_were(sizes):
    expert, tensor = sizes
    mesh = make_mesh(jax.devices()[: expert * tensor], expert=expert, tensor=tensor)
    original = flatten(placed_params(init_params(MODEL, jax.random.key(0)), MODEL, mesh))
    index, paths = place(selected_index(SELECTED), mesh), trainable_paths(MODEL, "selected_experts")
    rows = split(original, paths, MODEL, mesh, index=index)
    assert set(rows) == {f"{path}/rows" for path in paths}
    for path in paths:
        np.testing.assert_array_equal(rows[f"{path}/rows"][0], original[path][0][np.array([1, 4])])
        np.testing.assert_array_equal(rows[f"{path}/rows"][1, 0], original[path][1][5])
    back = to_host(merge(original, {path: 2 * array for path, array in rows.items()}, MODEL, mesh, index=index))
    for path, array in original.items():
        times = SELECTED.reshape(2, 6, *(1,) * (array.ndim - 2)) + 1 if path in paths else 1
        np.testing.assert_array_equal(back[path], times * np.asarray(array), err_msg=path)


def steps(forget, retain, mesh, *, masked):
    """Arrays of experts after 5 steps: rows trained, or everything with masked updates."""
    config = dataclasses.replace(SHARED, trainable="experts") if masked else CONFIG
    original = flatten(placed_params(init_params(MODEL, jax.random.key(0)), MODEL, mesh))
    paths = trainable_paths(MODEL, "experts")
    run = set_up(original, config, MODEL, selected=None if masked else SELECTED, parallel=PLAIN, mesh=mesh)
    constants = Constants(original, *place(run.constants[1:], mesh))
    if masked:
        masks = {p: SELECTED.reshape(2, 6, *(1,) * (original[p].ndim - 2)).astype(np.float32) for p in paths}
        constants = constants._replace(masks=place(masks, mesh))
    state, settings = run.start(constants), run.settings
    multiple = row_multiple(settings, mesh)
    batches = [pad_rows(rows.batch(np.arange(8)), multiple) for rows in (forget, retain)]
    inputs = place(StepRows(*batches, batches[1].valid.astype(np.float32)), mesh, PartitionSpec(BATCH_AXES))
    for _ in range(5):
        state, _ = unlearning_step(state, constants, inputs, settings=settings, mesh=mesh)
    if not masked:
        assert jax.tree.leaves(state.optimizer)[1].size < sum(original[path].size for path in paths)
    after = merge(original, state.trainable, MODEL, mesh, index=constants.index)
    return tuple(to_host({path: arrays[path] for path in paths}) for arrays in (after, original))


@pytest.fixture(scope="module")
def masked(forget, retain):
    return steps(forget, retain, make_mesh(jax.devices()[:1]), masked=True)[0]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_training_rows_is_training_all_with_masked_updates(forget, retain, masked, sizes):
    data, expert, tensor = sizes
    mesh = make_mesh(jax.devices()[: data * expert * tensor], expert=expert, tensor=tensor)
    after, before = steps(forget, retain, mesh, masked=False)
    for path, wanted in masked.items():
        np.testing.assert_allclose(after[path], wanted, atol=2e-5, err_msg=path)
        np.testing.assert_array_equal(after[path][~SELECTED], before[path][~SELECTED])
        assert (after[path][SELECTED] != before[path][SELECTED]).mean() > 0.9


def test_other_experts_are_bit_identical_after_20_decayed_steps_also_after_the_selection_changes(model, forget, retain):
    """AdamW with weight decay; the second run starts where the first ended, with other experts."""
    config = dataclasses.replace(CONFIG, steps=20, forget_batch_size=4, retain_batch_size=4, evaluate_every=20)
    first, second = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    first[0, [0, 3]], second[:, 1] = True, True
    mesh = make_mesh(jax.devices()[:1])
    for selected in (first, second):
        after = unlearn(model, forget, retain, config=config, selected=selected, mesh=mesh).model
        for path, array in flatten(model.params).items():
            old, new = np.asarray(array), np.asarray(flatten(after.params)[path])
            if path.startswith("layers/experts/"):
                assert (new[selected] != old[selected]).mean() > 0.9
                old, new = old[~selected], new[~selected]
            np.testing.assert_array_equal(new, old, err_msg=path)
        model = after
