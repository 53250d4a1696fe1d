"""Parameters survive the disk bit by bit, and a file that doesn't fit the model says what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.checkpoints.params import load_params, parameter_count, save_params

PARAMS = {"embed": jnp.arange(6.0).reshape(3, 2), "layers": {"down": jnp.ones((2, 3), jnp.bfloat16)}}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)


def test_round_trip(tmp_path):
    save_params(tmp_path / "model.safetensors", PARAMS, {"step": 3})
    params, metadata = load_params(tmp_path / "model.safetensors", ABSTRACT)
    assert metadata == {"step": 3}
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    save_params(tmp_path / "m.safetensors", {"embed": PARAMS["embed"], "other": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"missing tensors \['layers.down'\], unexpected \['other'\]"):
        load_params(tmp_path / "m.safetensors", ABSTRACT)


def test_wrong_shape_is_named(tmp_path):
    save_params(tmp_path / "m.safetensors", {**PARAMS, "embed": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"embed is float32\[2, 2\], expected float32\[3, 2\]"):
        load_params(tmp_path / "m.safetensors", ABSTRACT)


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_truncated_file_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        load_params(tmp_path / "m.safetensors", ABSTRACT)


def test_nothing_is_left_behind_when_writing_fails(tmp_path):
    with pytest.raises(TypeError):
        save_params(tmp_path / "m.safetensors", PARAMS, {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_parameter_count():
    assert parameter_count(PARAMS) == 12
