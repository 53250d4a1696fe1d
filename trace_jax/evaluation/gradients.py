"""How strongly a text would change a model: the norm of the gradient of its loss, for membership inference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.io.progress import tracked
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import padded_size
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.hosts import place, to_host
from trace_jax.parallel.mesh import ROWS, row_shards


def gradient_norms(
    model: Model, sequences: Sequence[Sequence[int]], first: Sequence[int], *, mesh: Mesh | None = None
) -> np.ndarray:
    """Euclidean norm over all parameters of the gradient of each text's mean loss: f64 [N] (2402.17012, p = 2).

    One text at a time, with memory for one gradient of the size of the parameters; its layers are computed again in
    the backward pass. open-unlearning averages the norms of single tensors instead, which depends on how a model's
    parameters are cut into tensors.

    Args:
      sequences: token ids; `sequence[first:]` is scored, at least one token of each.
      mesh: devices that hold the parameters and the gradient; None: the default device.
    """
    params = model.unguided("a gradient")
    params = params if mesh is None else placed_params(params, model.config, mesh)
    rows = 1 if mesh is None else row_shards(mesh)
    function, norms = _norm_function(model.config, mesh), []
    for sequence, start in tracked(zip(sequences, first, strict=True), "gradient norms", len(sequences)):
        arrays = _padded(np.asarray(sequence, np.int32), int(start), rows)
        arrays = arrays if mesh is None else place(arrays, mesh, PartitionSpec(ROWS))
        norms.append(float(to_host(function(params, *arrays))))
    return np.array(norms, np.float64)


def _padded(sequence: np.ndarray, start: int, rows: int) -> tuple[np.ndarray, ...]:
    """(tokens, mask, targets i32 [rows, S], weights f32 [rows, S]); only the first row has weights."""
    if not 1 <= start < len(sequence):
        raise ValueError(f"a gradient needs a scored token; the sequence has {len(sequence)}, the first is {start}.")
    width = padded_size(len(sequence))
    tokens, mask, targets = (np.zeros((rows, width), np.int32) for _ in range(3))
    tokens[:, : len(sequence)], mask[:, : len(sequence)] = sequence, 1
    targets[:, : len(sequence) - 1] = sequence[1:]
    weights = np.zeros((rows, width), np.float32)
    weights[0, start - 1 : len(sequence) - 1] = 1 / (len(sequence) - start)
    return tokens, mask, targets, weights


@functools.lru_cache(maxsize=4)
def _norm_function(config: ModelConfig, mesh: Mesh | None):
    def loss(params, tokens, mask, targets, weights):
        hidden = forward(params, config, tokens, mask=mask, collect=("hidden",), remat="layer").hidden
        assert hidden is not None  # it was asked for
        total = (token_nll(params, config, hidden, targets) * weights).sum()
        return total if mesh is None else jax.lax.psum(total, ROWS)

    function = loss if mesh is None else on_mesh(loss, config, mesh, out_specs=PartitionSpec())

    def norm(params, *arrays):
        gradient = jax.grad(function)(params, *arrays)
        squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(gradient)]
        return jnp.sqrt(jnp.stack(squares).sum())

    return jax.jit(norm)
