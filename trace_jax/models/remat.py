"""What the backward pass of a layer keeps of the forward pass, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax

from trace_jax.models.arrays import flatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.sharding import Delta, merging_shapes
from trace_jax.parallel.mesh import axis_sizes

# Primitives that move numbers without computing any. Keeping their results would keep gathered weights.
_MOVES = frozenset(
    {"all_gather", "name", "reshape", "transpose", "convert_element_type", "slice", "dynamic_slice", "squeeze", "pad",
     "concatenate", "broadcast_in_dim", "gather", "scatter", "copy", "pvary", "pcast", "split", "rev"}
)  # fmt: skip


def _keep_computed(primitive, *_, **__) -> bool:
    return primitive.name not in _MOVES


def rematerialized(layer: Callable, policy: str, params: Any, config: ModelConfig, prefix: str) -> Callable:
    """`layer(x, (params, ...))` with what its backward pass computes again.

    Args:
      policy: "none": nothing, except that weights in pieces (cut by a mesh, or a `Delta`) are put together again;
        "dots": everything but matrix products without batch dimensions; "layer": everything, from its input on.
      params: of a stack of layers, below the path `prefix`.
    """
    if policy == "layer":
        return jax.checkpoint(layer)
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else _keep_computed
    in_pieces = any(isinstance(leaf, Delta) for leaf in flatten(params).values())
    if policy == "none" and not in_pieces and all(size == 1 for size in axis_sizes().values()):
        return layer
    merging = merging_shapes(params, config, prefix)

    def keep_but_weights(primitive, *operands, **settings) -> bool:
        return keep(primitive, *operands, **settings) and tuple(x.shape for x in operands) not in merging

    return jax.checkpoint(layer, policy=keep_but_weights)
