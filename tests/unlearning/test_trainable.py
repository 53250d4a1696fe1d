"""Trainable parameters, by path, by layer and by expert, as they are written down by family and by preset.

To write the files of tests/golden again after a change that is meant: TRACE_JAX_WRITE_GOLDEN=1 pytest THIS_FILE

Training a few experts is training all of them with the updates of the others masked, at a fraction of the memory. SEUF
trains its experts and their routers, nothing else, and its anchor is the loss of the paper or of the code.
"""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_checkpoints import fields_of

from tests import tiny
from tests.unlearning.conftest import CONFIG, ONE, flat_of, statistics_of
from trace_jax.config import ConfigError
from trace_jax.io.files import read_lines
from trace_jax.models.architecture import abstract_params, flatten
from trace_jax.models.decoder import forward
from trace_jax.models.families import model_config
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, place, to_host
from trace_jax.routing.config import select_experts
from trace_jax.routing.differences import expert_drift
from trace_jax.unlearning.config import SomeExperts, Trainable, UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants, anchor_loss
from trace_jax.unlearning.step import row_multiple, set_up, unlearning_step
from trace_jax.unlearning.trainable import (
    chosen_experts,
    merge,
    selected_index,
    split,
    table_text,
    trainable_paths,
    trainable_table,
    update_masks,
)
from trace_jax.unlearning.unlearn import unlearn

GOLDEN, WRITE = Path(__file__).parents[1] / "golden", "TRACE_JAX_WRITE_GOLDEN"
PRESETS = [name for name in Trainable.kinds if name != "patterns"]
EXPERTS = {"layers/experts/gate_up", "layers/experts/down"}
MIXED = dataclasses.replace(
    tiny.CONFIG, num_layers=4, dense_layers=(0, 2), dense_hidden_size=8, router_bias=True, router_correction=True
)
LAST = np.array([[0, 0, 0, 0], [0, 0, 0, 1]], bool)


def paths_of(trainable, model=tiny.CONFIG):
    return trainable_paths(model, UnlearningConfig(trainable=trainable).trainable)


def test_first_matching_pattern_wins():
    training = paths_of(("!layers/experts/down", "layers/*"))
    assert "layers/experts/down" not in training
    assert "layers/experts/gate_up" in training and "embed" not in training


@pytest.mark.parametrize("trainable", ["expert", ("!*",), "layers/router_correction"])
def test_unusable_patterns_are_refused(trainable):
    with pytest.raises(ConfigError, match="neither a preset" if trainable == "expert" else "freezes every"):
        paths_of(trainable, MIXED)


def test_a_layer_range_counts_the_layers_of_the_network_in_both_stacks():
    masks = update_masks(paths_of("down_projections", MIXED), MIXED, layers=(3, 4))
    numbers = {path: mask.reshape(-1).tolist() for path, mask in masks.items()}
    assert numbers == {"layers/experts/down": [0.0, 1.0], "dense/mlp/down": [0.0, 1.0]}  # layers 2, 4 and 1, 3
    with pytest.raises(ConfigError, match=r"nothing of layers/experts/down, .* no part of it is in layers \(1, 1\)"):
        update_masks(paths_of("experts", MIXED), MIXED, layers=(1, 1))


def test_routers_train_in_the_layers_of_selected_experts_and_whole_arrays_of_experts_need_no_mask():
    masks = update_masks(paths_of("seuf", MIXED), MIXED, selected=LAST)
    numbers = {path: mask.reshape(-1).tolist() for path, mask in masks.items()}
    of_router = {"layers/router": [0.0, 1.0], "layers/router_bias": [0.0, 1.0]}
    assert numbers == {f"{path}/rows": [1.0] for path in EXPERTS} | of_router
    assert update_masks(paths_of("selected_experts", MIXED), MIXED, selected=LAST) is None


def test_the_correction_never_trains_and_frozen_routers_are_whole():
    for trainable in ("all", ("*",), ("layers/router*",)):
        training = paths_of(trainable, MIXED)
        assert "layers/router_correction" not in training and "layers/router_bias" in training
    frozen = set(flatten(abstract_params(MIXED))) - set(paths_of("routers_frozen", MIXED))
    assert frozen == {"layers/router", "layers/router_bias", "layers/router_correction"}


def some_experts(config, preset):
    """SEUF's default, one expert of the model, or two of each layer; None where whole arrays train."""
    selected = np.zeros((len(config.moe_layers), config.num_experts), bool)
    selected[(-1, 3) if preset == "seuf" else np.s_[:, :2]] = True
    return selected if issubclass(Trainable.kinds[preset], SomeExperts) else None


def table_of(config, preset):
    return trainable_table(config, UnlearningConfig(trainable=preset), some_experts(config, preset))


@pytest.mark.parametrize(("family", "layers"), [("olmoe", 3), ("qwen2_moe", 3), ("deepseek_v2", 4)])
def test_what_trains_is_what_is_written_down(family, layers):
    fields = {"model_type": family, **fields_of(family), "num_hidden_layers": layers}
    config = model_config(fields, dtype="bfloat16")
    text = "\n".join(f"{preset}\n{table_text(table_of(config, preset))}\n" for preset in PRESETS)
    path = GOLDEN / f"trained_{family}.txt"
    if os.environ.get(WRITE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"the trainable parameters changed; if that is meant, run with {WRITE}=1"


def test_the_table_counts_every_number_once():
    config = model_config({"model_type": "qwen2_moe", **fields_of("qwen2_moe")}, dtype="float32")
    params = abstract_params(config)
    table = {row["path"]: row for row in table_of(config, "seuf")}
    D, E, F = config.hidden_size, config.num_experts, config.expert_hidden_size
    trained = {path: row["trained"] for path, row in table.items() if row["trained"]}
    assert trained == {"layers/experts/gate_up": D * 2 * F, "layers/experts/down": F * D, "layers/router": D * E}
    assert {path: row["parameters"] for path, row in table.items()} == {p: x.size for p, x in flatten(params).items()}


# --- a few experts


MODEL = dataclasses.replace(tiny.CONFIG, num_experts=6)
SELECTED = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
ROWS = UnlearningConfig(alpha=2.0, learning_rate=0.01, weight_decay=0.1, clip_norm=0.5, trainable="selected_experts")
SEUF = dataclasses.replace(CONFIG, trainable="seuf", weight_decay=0.1, learning_rate=0.01)
ONE_EXPERT = np.array([[0, 0, 0, 0], [0, 0, 1, 0]], bool)
OTHER = np.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (2, 2)])
def test_rows_split_off_and_merged_are_where_they_were(sizes):
    assert selected_index(SELECTED).tolist() == [[1, 4], [5, 6]]  # as many places as the fullest layer
    mesh = tiny.mesh_of(1, *sizes)
    original = flatten(placed_params(tiny.make_model(MODEL).params, MODEL, mesh))
    index, paths = place(selected_index(SELECTED), mesh), trainable_paths(MODEL, ROWS.trainable)
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
    """Arrays of experts after 5 steps, and before: rows trained, or everything with masked updates."""
    config = dataclasses.replace(ROWS, trainable="experts") if masked else ROWS
    original = flatten(placed_params(tiny.make_model(MODEL).params, MODEL, mesh))
    paths = trainable_paths(MODEL, ROWS.trainable)
    selected = None if masked else SELECTED
    settings, constants, start = set_up(original, config, MODEL, selected=selected, parallel=PLAIN, mesh=mesh)
    constants = Constants(original, *place(constants[1:], mesh))
    if masked:
        masks = {p: SELECTED.reshape(2, 6, *(1,) * (original[p].ndim - 2)).astype(np.float32) for p in paths}
        constants = constants._replace(masks=place(masks, mesh))
    batches = [pad_rows(rows.batch(np.arange(8)), row_multiple(settings, mesh)) for rows in (forget, retain)]
    state = start(constants)
    inputs = place(StepRows(*batches, batches[1].valid.astype(np.float32)), mesh, PartitionSpec(BATCH_AXES))
    for _ in range(5):
        state, _ = unlearning_step(state, constants, inputs, settings=settings, mesh=mesh)
    if not masked:
        assert jax.tree.leaves(state.optimizer)[1].size < sum(original[path].size for path in paths)
    after = merge(original, state.trainable, MODEL, mesh, index=constants.index)
    return tuple(to_host({path: arrays[path] for path in paths}) for arrays in (after, original))


def test_training_rows_is_training_all_with_masked_updates_on_any_mesh(forget, retain):
    wanted, _ = steps(forget, retain, ONE, masked=True)
    after, before = steps(forget, retain, tiny.mesh_of(1, 2, 2), masked=False)
    for path in wanted:
        np.testing.assert_allclose(after[path], wanted[path], atol=2e-5, err_msg=path)
        np.testing.assert_array_equal(after[path][~SELECTED], before[path][~SELECTED])
        assert (after[path][SELECTED] != before[path][SELECTED]).mean() > 0.9


# --- SEUF


def by_hand(probabilities, indices, target, valid, form):
    """Mean over valid tokens, one token and one layer at a time."""
    total = 0.0
    for layer in range(len(target)):
        if not target[layer].any():
            continue
        for row, position in np.argwhere(valid):
            g = probabilities[layer, row, position].astype(np.float64)
            if form == "sum":
                g = np.where(np.isin(np.arange(len(g)), indices[layer, row, position]), g, 0.0)
            error = (g - target[layer]) ** 2
            total += error.sum() if form == "sum" else error.sum() / len(g)
    return total / valid.sum()


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_anchor_is_that_of_a_loop_over_tokens(form):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    indices = np.argsort(-logits, axis=-1)[..., :2].astype(np.int32)
    target = np.zeros((3, 6), bool)
    target[0, 2], target[2, 1], target[2, 5] = True, True, True
    valid = rng.random((4, 5)) < 0.6
    total = anchor_loss(*map(jnp.asarray, (probabilities, indices, selected_index(target), valid)), form=form)
    wanted = by_hand(probabilities, indices, target, valid, form)
    assert float(total) / valid.sum() == pytest.approx(wanted, rel=1e-5)


def run(model, forget, retain, selected, mesh=ONE, directory=None, **changes):
    config = dataclasses.replace(SEUF, **changes)
    return unlearn(model, forget, retain, config=config, selected=selected, mesh=mesh, directory=directory)


@pytest.fixture(scope="module")
def unlearned(model, forget, retain, tmp_path_factory):
    directory = tmp_path_factory.mktemp("seuf")
    return run(model, forget, retain, ONE_EXPERT, directory=directory, steps=20), directory


def assert_only(before, after, selected):
    """Exactly the selected experts and the routers of their layers differ."""
    layers, after = selected.any(axis=1), flat_of(after)
    for path, old in flat_of(before).items():
        new = after[path]
        trains = selected if path.startswith("layers/experts/") else layers if path == "layers/router" else None
        if trains is None:
            np.testing.assert_array_equal(new, old, err_msg=path)
            continue
        np.testing.assert_array_equal(new[~trains], old[~trains], err_msg=path)
        assert (new[trains] != old[trains]).mean() > 0.9, path


def test_exactly_its_parameters_train_also_after_the_selection_changes(model, forget, retain, unlearned):
    """Twenty steps of AdamW with weight decay; the second run starts where the first ended, with another expert."""
    first, _ = unlearned
    assert_only(model, first.model, ONE_EXPERT)
    np.testing.assert_array_equal(expert_drift(model, first.model) > 0, ONE_EXPERT)
    second = run(first.model, forget, retain, OTHER, steps=20)
    assert_only(first.model, second.model, OTHER)


def test_the_anchor_is_logged_and_is_that_of_the_original_at_the_first_step(model, forget, unlearned):
    """The first of the logged losses is taken at the original parameters, on the four rows that the step drew."""
    _, directory = unlearned
    anchors = [row["anchor_loss"] for row in read_lines(directory / "metrics.jsonl") if "anchor_loss" in row]
    router = forward(model.params, model.config, forget.tokens, mask=forget.segments, collect=("router",)).router
    probabilities, indices = np.asarray(jax.nn.softmax(router.logits, axis=-1)), np.asarray(router.indices)
    rows = [[i] for i in range(len(forget.tokens))]
    of_rows = [by_hand(probabilities[:, i], indices[:, i], ONE_EXPERT, forget.valid[i], "sum") for i in rows]
    assert min(of_rows) < anchors[0] < max(of_rows)


def test_a_strong_anchor_holds_forget_tokens_on_the_target(model, forget, retain):
    def share(anchor):
        after = run(model, forget, retain, ONE_EXPERT, trainable={"name": "seuf", "anchor": anchor}, steps=10).model
        return statistics_of(after, forget)[0].frequency[1, 2]

    assert share(100.0) > share(1e-6)


def test_a_margin_moves_no_router_that_does_not_train(model, forget, retain):
    """GRIP beside SEUF: the margin is wider than the scores of the original are apart, in every layer."""
    grip = {"name": "project", "tokens": 4, "margin": 2.0}
    assert_only(model, run(model, forget, retain, ONE_EXPERT, steps=2, grip=grip).model, ONE_EXPERT)


def test_a_mesh_trains_the_same(model, forget, retain):
    """Rows, experts and routers lie in pieces; forget rows are padded to a multiple of the devices."""
    mesh = tiny.mesh_of(2, 2, 2)
    one, many = (flat_of(run(model, forget, retain, ONE_EXPERT, m, steps=3).model) for m in (ONE, mesh))
    for path, array in one.items():
        np.testing.assert_allclose(many[path], array, atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def statistics(model, forget, retain):
    return statistics_of(model, forget, retain)


def some(experts):
    return UnlearningConfig(trainable={"name": "selected_experts", "experts": experts})


def test_by_default_the_expert_of_highest_affinity_of_the_model_trains(statistics):
    chosen = chosen_experts(SEUF, np.zeros((2, 4), bool), *statistics, seed=0)
    affinity = statistics[0].affinity
    assert chosen.sum() == 1 and affinity[chosen] == affinity.max()


@pytest.mark.parametrize("rule", ["difference", "affinity", "random"])
def test_rules_of_seuf_take_one_expert_of_the_model_and_those_of_others_four_of_each_layer(rule):
    of_seuf = UnlearningConfig(trainable={"name": "seuf", "experts": rule}).trainable.experts
    assert (of_seuf.name, of_seuf.top, of_seuf.scope) == (rule, 1, "model")
    assert (some(rule).trainable.experts.top, some(rule).trainable.experts.scope) == (4, "layer")


def test_esft_takes_experts_by_falling_share_until_they_cover_enough_and_asks_no_retain_set(statistics):
    """generate_expert_config.py of deepseek-ai/ESFT on one layer's shares, as the paper has them: sums over experts."""
    forget, _ = statistics
    esft = chosen_experts(some({"name": "cumulative", "mass": 0.6}), ONE_EXPERT, *statistics, seed=0)
    for layer, counts in enumerate(forget.counts):
        shares, taken, covered = counts / counts.sum(), [], 0.0
        for expert in sorted(range(len(shares)), key=lambda e: -shares[e]):
            if covered >= 0.6:
                break
            taken.append(expert)
            covered += shares[expert]
        assert sorted(taken) == np.flatnonzero(esft[layer]).tolist()
    critical = select_experts(*statistics, rule="cumulative", mass=0.6)
    assert (esft | ~critical).all() and esft.sum() > critical.sum() > 0
    assert some("cumulative").trainable.experts.mass == 0.15


def test_random_experts_follow_the_seed_and_the_calibration_is_the_default(statistics):
    config = some({"name": "random", "top": 2})
    one, again, other = (chosen_experts(config, ONE_EXPERT, *statistics, seed=seed) for seed in (0, 0, 1))
    assert (one.sum(axis=1) == 2).all() and (one == again).all() and (one != other).any()
    default = UnlearningConfig(trainable="selected_experts")
    assert chosen_experts(default, ONE_EXPERT, *statistics, seed=0) is ONE_EXPERT
    assert chosen_experts(UnlearningConfig(), ONE_EXPERT, *statistics, seed=0) is None


def test_unusable_choices_of_experts_are_refused(model, forget, retain, statistics):
    config = dataclasses.replace(SEUF, trainable={"name": "seuf", "experts": {"top": 9}})
    with pytest.raises(ConfigError, match="experts is 'affinity': top is 9; expected 1 to 8"):
        chosen_experts(config, ONE_EXPERT, *statistics, seed=0)
    for selected in (None, np.zeros((2, 4), bool)):
        with pytest.raises(ConfigError, match="'seuf', but no expert is selected"):
            unlearn(model, forget, retain, config=SEUF, selected=selected)
    steered = UnlearningConfig(objective="rmu", trainable="seuf")
    message = r"layer 1, and the selected experts are in layers 2, above it.*unlearning.objective.layer to 2"
    with pytest.raises(ConfigError, match=message):
        unlearn(model, forget, retain, config=steered, selected=ONE_EXPERT)
    with pytest.raises(ValueError, match=r"selected is \(1, 4\); the model has \(2, 4\)"):
        unlearn(model, forget, retain, config=SEUF, selected=ONE_EXPERT[1:])
