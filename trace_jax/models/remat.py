"""What the backward pass of a layer keeps of the forward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from trace_jax.models.sharding import Replaced
from trace_jax.parallel.mesh import axis_sizes

# Primitives that move numbers without computing any. Keeping their results would keep gathered weights.
_MOVES = frozenset(
    {"all_gather", "name", "reshape", "transpose", "convert_element_type", "slice", "dynamic_slice", "squeeze", "pad",
     "concatenate", "broadcast_in_dim", "gather", "scatter", "copy", "pvary", "pcast", "split", "rev"}
)  # fmt: skip


def _is_replaced(node: Any) -> bool:
    return isinstance(node, Replaced)


def _keep_computed(primitive, *_, **__) -> bool:
    return primitive.name not in _MOVES


def rematerialized(layer: Callable, policy: str, params: Any) -> Callable:
    """`layer(x, (params, ...))` with what its backward pass computes again.

    Args:
      policy: "none": nothing, except that weights in pieces (cut by a mesh, or `Replaced`) are put together again;
        "dots": everything but matrix products without batch dimensions; "layer": everything, from its input on.
    """
    if policy == "layer":
        return jax.checkpoint(layer)
    if policy == "dots":
        return jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    in_pieces = any(isinstance(leaf, Replaced) for leaf in jax.tree.leaves(params, is_leaf=_is_replaced))
    if in_pieces or any(size > 1 for size in axis_sizes().values()):
        return jax.checkpoint(layer, policy=_keep_computed)
    return layer
