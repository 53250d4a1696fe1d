"""What a run keeps survives the disk bit by bit: parameters, and states on any mesh, never a damaged one."""

import gc
import json
import resource
import shutil
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open

from trace_jax.checkpoints.state import StateStore, load_params, save_params

# Orbax leaves the coroutines of failed reads behind; they end when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FOUR = tiny.mesh_of(4, 1, 1)
ABOUT = {"identity": "a", "seed": 7}
SPECS = {"step": P(), "embedding": P("data"), "moments": {"m": P(None, "data"), "half": P()}}


@pytest.fixture(autouse=True)
def failed_reads():
    yield
    time.sleep(0.05)
    gc.collect()


def shardings(mesh, specs=SPECS):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def values(seed):
    rng = np.random.default_rng(seed)
    embedding, m = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 33), (3, 16, 5)))
    moments = {"m": m, "half": rng.normal(size=9).astype(jnp.bfloat16)}
    return {"step": np.int32(seed), "embedding": embedding, "moments": moments}


def placed(seed, mesh=FOUR):
    return jax.device_put(values(seed), shardings(mesh))


def assert_same(state, expected):
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three states saved on four devices, the oldest of which is gone."""
    path = tmp_path_factory.mktemp("states")
    with StateStore(path, ABOUT) as store:
        for step in (1, 2, 3):
            store.save(step, placed(step))
    return path


@pytest.fixture
def states(saved, tmp_path):
    """A copy of them to damage."""
    return shutil.copytree(saved, tmp_path / "states")


def restore(path, like=None, about=ABOUT):
    with StateStore(path, about) as store:
        return store.restore(placed(0) if like is None else like)


def values_of(path):
    """The file that holds the values of a state: its largest."""
    return max((file for file in (path / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_the_two_newest_are_kept_and_say_what_they_are(saved):
    assert sorted(folder.name for folder in saved.iterdir()) == ["2", "3"]
    about = json.loads((saved / "3/about/metadata").read_text())
    assert about.items() >= {**ABOUT, "step": 3, "data_position": 3}.items()


def test_a_state_of_four_devices_is_restored_on_one_or_by_its_shapes_on_a_mesh_of_another_shape(saved):
    specs = {"step": P(), "embedding": P(("data", "expert")), "moments": {"m": P(None, "expert"), "half": P()}}
    shapes = jax.eval_shape(lambda: values(0))
    cut = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, shardings(tiny.mesh_of(2, 2, 1), specs))
    for like in (placed(0, tiny.mesh_of(1, 1, 1)), cut):
        step, state = restore(saved, like)
        assert step == 3
        assert_same(state, values(3))
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)


@pytest.mark.parametrize("spec", [P(), P("data")])
def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, spec):
    """32 MiB take the writer longer than the steps that overwrite them."""
    step = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)
    x = jax.device_put(np.zeros((1 << 21,), np.float32), NamedSharding(FOUR, spec))
    with StateStore(tmp_path, ABOUT) as store:
        store.save(1, {"x": x})
        for _ in range(5):
            x = step(x)
        jax.block_until_ready(x)
    _, state = restore(tmp_path, {"x": x})
    assert float(state["x"].max()) == 0.0 and float(x.min()) == 5.0


def test_a_state_that_can_not_be_written_is_an_error_in_words(tmp_path):
    """Of Orbax, which speaks of coroutines and error codes."""
    state = {"x": jnp.arange(20_000, dtype=jnp.float32)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StateStore(tmp_path, ABOUT) as store:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
            with pytest.raises(OSError, match=f"{tmp_path.name}: a state can't be written: File too large"):
                store.save(1, state)
                store.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert restore(tmp_path, state)[1] is None


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        ("values", truncate),
        ("values", flip),
        ("values", Path.unlink),
        ("manifest.ocdbt", truncate),
        ("manifest.ocdbt", flip),
        ("about/metadata", flip),
        ("about/metadata", lambda file: file.write_bytes(b"")),
    ],
)
def test_a_damaged_state_is_skipped_for_the_one_before(states, which, damage, caplog):
    newest = states / "3"
    damage(values_of(newest) if which == "values" else next(newest.rglob(which), newest / which))
    step, state = restore(states)
    assert step == 2
    assert_same(state, values(2))
    assert "the state of step 3 can't be restored and is skipped" in caplog.text or which == "about/metadata"
    assert not newest.exists()


def test_what_a_kill_leaves_while_saving_is_no_state_and_is_cleared_away(states):
    (states / "4.orbax-checkpoint-tmp").mkdir()
    (states / "3/state").rename(states / "4.orbax-checkpoint-tmp/state")
    (states / "3").rename(states / "3.orbax-checkpoint-tmp")
    with StateStore(states, ABOUT) as store:
        assert store.restore(placed(0))[0] == 2
        store.save(3, placed(3))
    assert sorted(folder.name for folder in states.iterdir()) == ["2", "3"]
    assert restore(states)[0] == 3


def test_where_none_can_be_restored_the_run_starts_from_the_beginning_and_says_so(states, caplog):
    for step in ("2", "3"):
        truncate(values_of(states / step))
    assert restore(states) == (0, None)
    assert "no saved state can be restored; starting from the beginning" in caplog.text
    with StateStore(states, ABOUT) as store:
        assert store.empty
        store.save(1, placed(1))
    assert restore(states)[0] == 1


def test_states_of_other_settings_are_removed(states, caplog):
    assert restore(states, about={**ABOUT, "seed": 8}) == (0, None)
    assert not caplog.text and not list(states.iterdir())


def test_too_little_memory_does_not_cost_the_state(states, monkeypatch):
    full = mock.Mock(side_effect=jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    with monkeypatch.context() as patched, pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        patched.setattr(ocp.StandardCheckpointHandler, "restore", full)
        restore(states)
    assert restore(states)[0] == 3


PARAMS = {"embed": jnp.arange(6.0).reshape(3, 2), "layers": {"down": jnp.ones((2, 3), jnp.bfloat16)}}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)


def test_parameters_come_back_with_what_is_known_of_them(tmp_path):
    save_params(tmp_path / "model.safetensors", PARAMS, {"step": 3})
    params = load_params(tmp_path / "model.safetensors", ABSTRACT)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["trace_jax"]) == {"step": 3}
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, PARAMS)
    assert_same(params, PARAMS)
    with pytest.raises(TypeError):
        save_params(tmp_path / "other.safetensors", PARAMS, {"bad": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"embed": PARAMS["embed"], "x": jnp.ones(1)}, r"missing tensors \['layers.down'\], unexpected \['x'\]"),
        ({**PARAMS, "embed": jnp.ones((2, 2))}, r"embed is float32\[2, 2\], expected float32\[3, 2\]"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "can't be read as safetensors"),
    ],
)
def test_a_file_that_is_not_of_these_parameters_is_refused(params, message, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(params) if isinstance(params, bytes) else save_params(path, params, {})
    with pytest.raises(ValueError, match=message):
        load_params(path, ABSTRACT)
