"""Matrix multiplication of groups of rows, each with its own weights: the one seam to the hardware.

`y[n] = x[n] @ w[g(n)]`, where rows are sorted by group and `group_sizes` says how many each group has. Every
implementation passes the same conformance test. `auto` is `DEFAULTS`; docs/scaling.md, "Grouped matmul", says what each
choice rests on.

| implementation | runs on | product | gradient of w |
|---|---|---|---|
| `ragged` | everywhere | `jax.lax.ragged_dot`: a kernel on TPU, E times the work elsewhere | E times the work |
| `mosaic` | TPU | the kernel of `ragged_dot` | a Pallas kernel |
| `triton` | GPU | a Pallas kernel | a Pallas kernel |
| `blocked` | everywhere | both products of a layer's experts in one loop over blocks of slots | another loop |
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trace_jax.models.architecture import GROUPED_MATMULS
from trace_jax.parallel.mesh import as_varying, varying_axes

# CPU: as measured by benchmarks/train_step.py; never `ragged` there, which XLA expands to every group times every row.
DEFAULTS = {"cpu": "blocked", "gpu": "triton", "tpu": "mosaic"}
KERNELS = {"mosaic": "tpu", "triton": "gpu"}  # the platform that each is written for
MOST_BLOCKS = 8  # of a turn of `blocked_experts`
MOST_WEIGHTS = 2**18  # numbers of gate_up that a turn copies: more leave the cache
FEW_ROWS = 16  # with blocks of so few rows a turn copies a quarter of that, since copying is all that takes time there


def program_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices where there is a mesh (present or not), else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def implementations(platform: str) -> tuple[str, ...]:
    """The names that `platform` can run, "auto" included."""
    return tuple(name for name in GROUPED_MATMULS if KERNELS.get(name, platform) == platform)


def resolve_implementation(implementation: str, platform: str | None = None) -> str:
    """A concrete name for `implementation`; ValueError if `platform` can't run one of this name."""
    platform = platform or program_platform()
    if implementation not in implementations(platform):
        only = f", which runs on {KERNELS[implementation]} only," if implementation in KERNELS else ""
        expected = f"expected one of {', '.join(implementations(platform))}"
        raise ValueError(f"grouped_matmul is {implementation!r}{only} and the program is for {platform}; {expected}.")
    return DEFAULTS.get(platform, "blocked") if implementation == "auto" else implementation


def grouped_matmul(x, w, group_sizes, *, implementation: str) -> jax.Array:
    """[N, F]: rows x [N, D] times the weights w [E, D, F] of their group, in one type; kernels add up in float32.

    Rows beyond the sum of `group_sizes` i32 [E] are not read, nor are those of the gradient; what stands there in y and
    in the gradient of x is undefined. `implementation` is any but "blocked".
    """
    name = resolve_implementation(implementation)
    if name not in KERNELS:
        inside = (jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes))[:, None]
        return jnp.where(inside, jax.lax.ragged_dot(jnp.where(inside, x, 0), w, group_sizes), 0)  # both ways
    x, w, group_sizes = as_varying((x, w, group_sizes), varying_axes(x, w, group_sizes))
    if name == "triton":  # Pallas is imported where it is used only
        from trace_jax.models import grouped_matmul_gpu as kernels
    else:
        from trace_jax.models import grouped_matmul_tpu as kernels
    return _by_kernels(x, w, group_sizes, kernels)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_kernels(x, w, group_sizes, kernels):
    return kernels.product(x, w, group_sizes)


def _by_kernels_backward(kernels, residuals, dy):
    x, w, group_sizes = residuals
    return kernels.product(dy, w, group_sizes, transposed=True), kernels.weight_gradient(x, dy, group_sizes), None


_by_kernels.defvjp(lambda *operands: (_by_kernels(*operands), operands[:3]), _by_kernels_backward)


# --- a layer's experts as a loop over blocks of rows, whose gradient is another loop


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows per block of the blocked layout, a power of two between 4 and 256.

    Half a block per group is padding, and every block has its weights arranged for the processor once more, which costs
    as much as about 14 rows: the sum is least near the root of 28 times the mean group.
    """
    mean = max(1, num_rows // max(1, num_groups))
    return min(256, 1 << round(math.log2(28 * mean) / 2))


def block_layout(group_sizes: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Where groups go when each starts at a multiple of `size`: (first row of each group i32 [E], group of each block),
    for as many blocks as any sizes with sum `num_rows` can need; unused ones at the end carry the last group.
    """
    num_groups = group_sizes.shape[0]
    num_blocks = (num_rows + num_groups * (size - 1)) // size
    blocks, block = (group_sizes + (size - 1)) // size, jnp.arange(num_blocks, dtype=jnp.int32)
    ends = jnp.cumsum(blocks)
    group = jnp.sum((block[:, None] >= ends[None, :]).astype(jnp.int32), axis=1)
    return (ends - blocks) * size, jnp.minimum(group, num_groups - 1)


class Blocks(NamedTuple):
    """Where slots go in `blocked_experts`. A turn takes N blocks of R rows; the longest layout takes C turns."""

    slot: jax.Array  # i32 [C, N, R] slot (t*K + k) of each row; T*K where there is none
    group: jax.Array  # i32 [C, N] expert of each block
    turns: jax.Array  # i32 [] turns that have a slot
    trained: jax.Array | None  # i32 [] turns, the first, whose weights take a gradient; None: all
    place: jax.Array  # i32 [T, K] row of each slot, in the order of `slot`; 0 where it has none
    here: jax.Array  # bool [T, K] whether it has one


def make_blocks(slot, block_group, used, place_TK, weights: dict, trained=None) -> Blocks:
    """Blocks of P rows with a `slot` each (T*K: none); P/B rows at a time are of an expert of `block_group` i32 [B].

    The first `used` i32 [] blocks (or all) hold slots; the first `trained` i32 [] have weights that take a gradient
    (None: all). `place_TK` is the row of each slot; from P on it is not here, and counts as zero.
    """
    num_blocks, here = block_group.shape[0], place_TK < slot.shape[0]
    rows = slot.shape[0] // num_blocks
    most = MOST_WEIGHTS if rows > FEW_ROWS else MOST_WEIGHTS // 4
    per_turn = max(1, min(MOST_BLOCKS, num_blocks, most // weights["gate_up"][0].size))
    missing = -num_blocks % per_turn
    slot = jnp.pad(slot, (0, missing * rows), constant_values=place_TK.size).reshape(-1, per_turn, rows)
    group = jnp.pad(block_group, (0, missing), mode="edge").reshape(-1, per_turn)

    def turns(blocks):
        return (jnp.minimum(blocks, num_blocks) + (per_turn - 1)) // per_turn

    of_trained = None if trained is None else turns(trained)
    return Blocks(slot, group, turns(used), of_trained, jnp.where(here, place_TK, 0), here)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_experts(activate, weights: dict, x_TD: jax.Array, gates_TK: jax.Array, blocks: Blocks) -> jax.Array:
    """Sum over a token's slots of gate times expert: [T,D]. On a mesh all arrays vary over the same axes.

    `activate`: [..., 2F] -> [..., F]. `weights`: gate_up [E,D,2,F], down [E,F,D], maybe gate_up_bias and down_bias.
    Slots are sorted by expert, experts start at multiples of a block (`block_layout`), and a turn of the loop takes
    some blocks through everything, so that rows and weights stay in the processor's cache from one matmul to the next.
    The loop ends with the last block in use: room that no slot needs costs no time. Backward, gradients of weights are
    added up in place, and a gate's gradient is computed from the hidden values (g . (h W) = (g W^T) . h), so that
    neither copies of the weights nor outputs of experts are kept.
    """
    return _blocked_forward(activate, weights, x_TD, gates_TK, blocks)[0]


def _blocked_forward(activate, weights, x_TD, gates_TK, blocks: Blocks):
    token = _token(blocks)

    def multiply(name, x_NRD, group_N):
        y = jnp.einsum("nrd,ndf->nrf", x_NRD, flat(name, weights[name][group_N]))
        bias = weights.get(f"{name}_bias")
        return y if bias is None else y + flat(name, bias[group_N])[:, None]

    def turn(c, arrays):
        inside = multiply("gate_up", _rows(x_TD, token[c]), blocks.group[c])
        y = multiply("down", activate(inside), blocks.group[c])
        return arrays[0].at[c].set(inside), arrays[1].at[c].set(y)

    start = tuple(jnp.zeros((*token.shape, n), x_TD.dtype) for n in (2 * weights["down"].shape[1], x_TD.shape[1]))
    inside, y = jax.lax.fori_loop(0, blocks.turns, turn, as_varying(start, varying_axes(x_TD)))
    mixed = _sum_of_slots(y, jnp.where(blocks.here, gates_TK, 0), blocks.place)
    return mixed.astype(x_TD.dtype), (weights, x_TD, gates_TK, blocks, inside)


def _blocked_backward(activate, residuals, gradient_TD):
    weights, x_TD, gates_TK, blocks, inside = residuals
    token = _token(blocks)
    gates = gates_TK.reshape(-1).at[blocks.slot].get(mode="fill", fill_value=0)

    def turn(c, gradients, *, trained: bool):
        of_weights, of_x, of_gates = gradients
        group, gate = blocks.group[c], gates[c][..., None]
        hidden, activation_gradient = jax.vjp(activate, inside[c])
        x, gradient = _rows(x_TD, token[c]), _rows(gradient_TD, token[c])
        product = jnp.einsum("nrd,nfd->nrf", gradient, weights["down"][group], preferred_element_type=jnp.float32)
        of_gate = jnp.sum(product * hidden.astype(jnp.float32), axis=-1)
        if "down_bias" in weights:
            of_gate = of_gate + jnp.sum((gradient * weights["down_bias"][group][:, None]).astype(jnp.float32), axis=-1)
        (of_inside,) = activation_gradient((product * gate).astype(hidden.dtype))
        gradient = (gradient.astype(jnp.float32) * gate).astype(gradient.dtype)
        of_weights = dict(of_weights)
        for name, left, right in (("gate_up", x, of_inside), ("down", hidden, gradient)) if trained else ():
            add(of_weights, name, jnp.einsum("nrd,nrf->ndf", left, right, preferred_element_type=jnp.float32), group)
            if f"{name}_bias" in weights:
                add(of_weights, f"{name}_bias", jnp.sum(right.astype(jnp.float32), axis=1), group)
        of_x = of_x.at[c].set(jnp.einsum("nrf,ndf->nrd", of_inside, flat("gate_up", weights["gate_up"][group])))
        return of_weights, of_x, of_gates.at[c].set(of_gate)

    def add(of_weights, name, more, group):
        of_weights[name] = of_weights[name].at[group].add(more, indices_are_sorted=blocks.trained is None)

    start = (
        {name: jnp.zeros(flat(name, w).shape, jnp.float32) for name, w in weights.items()},
        jnp.zeros((*token.shape, x_TD.shape[1]), x_TD.dtype),
        jnp.zeros(token.shape, jnp.float32),
    )
    gradients = as_varying(start, varying_axes(gradient_TD))
    first = blocks.turns if blocks.trained is None else blocks.trained
    of_weights, *rest = jax.lax.fori_loop(0, first, partial(turn, trained=True), gradients)
    if blocks.trained is not None:  # later turns have no gradients of weights, nor carry them along
        rest = jax.lax.fori_loop(
            first, blocks.turns, lambda c, rest: turn(c, ({}, *rest), trained=False)[1:], tuple(rest)
        )
    of_weights = {name: of_weights[name].reshape(w.shape).astype(w.dtype) for name, w in weights.items()}
    of_x = _sum_of_slots(rest[0], blocks.here.astype(jnp.float32), blocks.place).astype(x_TD.dtype)
    return of_weights, of_x, jnp.where(blocks.here, rest[1].reshape(-1)[blocks.place], 0.0), None


blocked_experts.defvjp(_blocked_forward, _blocked_backward)


def _token(blocks: Blocks):
    """i32 [C,N,R] token of each row. Rows without a slot may take any: their gate is zero, their output is not read."""
    tokens, chosen = blocks.place.shape
    return jnp.minimum(blocks.slot // chosen, tokens - 1)


def _rows(x, index):
    return x.at[index].get(mode="promise_in_bounds")


def _sum_of_slots(rows, gates_TK, place_TK):
    """f32 [T,D]: every token's rows times their gates, as a sum of K gathers, of which XLA makes one pass."""
    rows = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32)
    parts = [_rows(rows, place_TK[:, k]) * gates_TK[:, k, None] for k in range(place_TK.shape[1])]
    return sum(parts[1:], parts[0])


def flat(name: str, w):
    """gate_up [...,D,2,F] as [...,D,2F], its bias [...,2,F] as [...,2F], down and its bias as they are."""
    return w.reshape(*w.shape[:-2], -1) if name.startswith("gate_up") else w
