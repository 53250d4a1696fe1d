"""Captures of routing are read in the shapes that servers give, and wrong ones refused with the place."""

import base64
import io

import numpy as np
import pytest

from trace_jax.data.published import DataError
from trace_jax.routing.captures import join, read_capture

EXPERTS, LENGTHS = 8, np.array([90, 10, 200])


@pytest.fixture
def chosen(random_routing):
    return random_routing(layers=3, tokens=300, experts=EXPERTS, top_k=2)  # [L, T, K]


def of_vllm(chosen):
    """Arrays of the prompt and of what was generated, int16; positions of a cached prefix are -1 (vLLM 0.21)."""
    prompt, generated = np.split(np.moveaxis(chosen, 1, 0).astype(np.int16), [80])
    cached = np.full((5, *prompt.shape[1:]), -1, np.int16)
    return np.concatenate([cached, prompt, generated]), np.array([95, 10, 200]), slice(None)


def of_vllm_http(chosen):
    """Base64 of what `np.save` writes, uint8, without the last token (vLLM's /inference/v1/generate)."""
    file = io.BytesIO()
    np.save(file, np.moveaxis(chosen, 1, 0)[:-1])
    answer = base64.b64encode(file.getvalue())
    return np.load(io.BytesIO(base64.b64decode(answer)), allow_pickle=False), np.array([90, 10, 199]), slice(0, 299)


def of_sglang(chosen):
    """Base64 of flat int32 [tokens - 1, layers, K], where layers without experts have places, too: zeros."""
    dense = np.zeros((1, *chosen.shape[1:]), np.int32)
    answer = base64.b64encode(np.moveaxis(np.concatenate([dense, chosen]), 1, 0)[:-1].tobytes())
    ids = np.frombuffer(base64.b64decode(answer), np.int32).reshape(-1, 4, 2)
    return ids, np.array([90, 10, 199]), slice(0, 299)


def of_tensorrt(chosen):
    """[tokens - 1, MoE layers, K] of each request."""
    return np.moveaxis(chosen, 1, 0)[:-1].astype(np.int32), None, slice(0, 299)


def of_tpu_inference(chosen):
    """[layers, tokens, K] of a step."""
    return chosen.astype(np.int64), LENGTHS, slice(None)


@pytest.mark.parametrize("server", [of_vllm, of_vllm_http, of_sglang, of_tensorrt, of_tpu_inference])
def test_what_a_server_gives_is_read(server, chosen, tmp_path):
    ids, lengths, tokens = server(chosen)
    arrays = {"expert_ids": ids} | ({} if lengths is None else {"row_lengths": lengths})
    np.savez(tmp_path / "capture.npz", gate_weights=np.ones(ids.shape), **arrays)
    read = read_capture(tmp_path / "capture.npz", EXPERTS)
    assert np.array_equal(read.indices, chosen[:, tokens]) and read.indices.dtype == np.uint8
    blocks = np.arange(299) // 256
    assert np.array_equal(read.rows, blocks if lengths is None else np.repeat(np.arange(3), LENGTHS)[tokens])
    assert read.layers == ((1, 2, 3) if server is of_sglang else (0, 1, 2))
    two = join([read, read])
    assert np.array_equal(two.indices[:, two.rows > read.rows.max()], read.indices)


def changed(place, values):
    def change(ids):
        ids = np.moveaxis(ids, 1, 0).astype(np.int32)
        ids[place] = values
        return {"expert_ids": ids, "row_lengths": LENGTHS}

    return change


def given(**others):
    return lambda ids: {"expert_ids": ids, **others}


MALFORMED = {
    "an id beyond E": (changed((95, 2), [1, 8]), "token 95 (row 1), layer 2: the experts are [1, 8]; there are 8,"),
    "half a token": (changed((7, 1), [3, -1]), "token 7 (row 0), layer 1: the experts are [3, -1]; there are 8"),
    "one layer": (changed((299, 0), [-1, -1]), "token 299 (row 2), layer 0: the experts are [-1, -1]; there are 8"),
    "a repeated expert": (changed((100, 0), [4, 4]), "token 100 (row 2), layer 0: the experts are [4, 4]; those of"),
    "nothing recorded": (changed((), 0), "holds nothing but 0 and -1"),
    "another type": (lambda ids: {"expert_ids": ids.astype(np.float32)}, "expert_ids is float32 (3, 300, 2)"),
    "flat": (lambda ids: {"expert_ids": ids.ravel()}, "expert_ids is uint8 (1800,); expected integers"),
    "two axes": (lambda ids: {"expert_ids": ids[:, :3]}, "(3, 3, 2) and there are no row_lengths; either of the first"),
    "ragged": (lambda ids: {"expert_ids": np.array([ids[0], ids[1, :9]], object)}, "Pickled arrays are refused"),
    "lengths": (given(row_lengths=LENGTHS[1:]), "row_lengths sum to 210; none of the first"),
    "no lengths": (given(row_lengths=LENGTHS / 2), "row_lengths is float64 (3,); expected counts"),
    "weights": (given(gate_weights=np.ones((300, 2))), "gate_weights is (300, 2); expected (3, 300, 2)"),
    "a key": (given(row_length=LENGTHS), "has the keys expert_ids, row_length; expected"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_capture_is_refused_with_the_place(case, chosen, tmp_path):
    make, message = MALFORMED[case]
    np.savez(tmp_path / "capture.npz", **make(chosen))
    with pytest.raises(DataError) as error:
        read_capture(tmp_path / "capture.npz", EXPERTS)
    assert str(error.value).startswith(f"{tmp_path / 'capture.npz'}: ") and message in str(error.value)


def test_files_that_hold_no_array_and_captures_of_two_models_are_refused(chosen, tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", expert_ids=chosen)
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = whole[:200] + bytes(50) + whole[250:]
    for content in (b"", b"not an array", b"PK\x03\x04", damaged):
        (tmp_path / "capture.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"can't be read as \.npz or \.npy"):
            read_capture(tmp_path / "capture.npy", EXPERTS)
    np.save(tmp_path / "capture.npy", chosen)
    other = read_capture(tmp_path / "capture.npy", EXPERTS)
    np.save(tmp_path / "capture.npy", chosen[:2])
    with pytest.raises(DataError, match=r"one is \(3, 300, 2\) .* another \(2, 300, 2\)"):
        join([other, read_capture(tmp_path / "capture.npy", EXPERTS)])
