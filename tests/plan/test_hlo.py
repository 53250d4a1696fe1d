"""What a program moves, counted on its text: small programs whose collectives and traffic are known by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from trace_jax.plan.hlo import traffic

LAYERS, D, F, B = 5, 64, 128, 32
CUT = P("data", "tensor")


def text_of(fn, in_specs, out_specs, *shapes):
    """The compiled text of `fn` inside shard_map on 2 x 2 devices, on float32 arrays of these global shapes."""
    run = jax.jit(jax.shard_map(fn, mesh=tiny.mesh_of(2, 1, 2), in_specs=in_specs, out_specs=out_specs))
    return run.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def sent_in(text):
    return {(c.kind, len(c.groups[0])): (c.count, c.bytes) for c in traffic(text, 4).collectives}


def test_collectives_in_a_loop_count_once_per_round():
    def layers(x, w):
        def layer(x, w):
            w = jax.lax.all_gather(w, "data", axis=0, tiled=True)
            return jax.lax.psum(jnp.tanh(x @ w) @ w.T, "tensor"), None

        return jax.lax.scan(layer, x, w)[0]

    text = text_of(layers, (P("data"), P(None, "data", "tensor")), P("data"), (B, D), (LAYERS, D, F))
    # A device gathers the other half of w [D, F/2] and, in a ring of two, sends half of x [B/2, D] twice.
    gathered, reduced = LAYERS * 4 * D * F / 4, LAYERS * 4 * B / 2 * D
    assert sent_in(text) == {("all-gather", 2): (LAYERS, gathered), ("all-reduce", 2): (LAYERS, reduced)}


def test_every_kind_of_collective_and_its_group():
    def fn(x):
        x = jax.lax.psum_scatter(x, ("data", "tensor"), scatter_dimension=0, tiled=True)
        x = jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True)
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    sent = sent_in(text_of(fn, (P(None, None),), P(("data", "tensor"), None), (B, D)))
    assert sent[("reduce-scatter", 4)] == (1, 4 * B * D * 3 / 4)
    assert sent[("all-to-all", 2)] == (1, 4 * B / 4 * D / 2)
    assert sent[("collective-permute", 2)] == (1, 4 * B / 4 * D)


def test_nested_loops_multiply():
    def fn(x):
        def inner(_, x):
            return jax.lax.pcast(jax.lax.psum(x, "tensor"), "tensor", to="varying")

        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 4, inner, x) * 0.5, x)

    assert sent_in(text_of(fn, (CUT,), CUT, (B, D)))[("all-reduce", 2)][0] == 12


def test_a_loop_that_data_ends_counts_one_round_and_its_share_of_what_goes_before():
    def fn(x):
        def step(state):
            n, x = state
            return n + 1, jnp.tanh(jax.lax.psum(x, ("data", "tensor")) + x)

        def goes_on(state):
            return (state[0] < 100) & (jnp.max(jax.lax.pmax(state[1], ("data", "tensor"))) < 9)

        before = jax.lax.all_gather(x, "data", axis=0, tiled=True)  # [B, D/2]
        return jax.lax.while_loop(goes_on, step, (0, before))[1][: B // 2]

    text = text_of(fn, (CUT,), CUT, (B, D))
    whole, shared = ({c.kind: (c.count, c.bytes) for c in traffic(text, 4, rounds=n).collectives} for n in (1, 8))
    assert whole["all-gather"] == (1, 4 * B / 2 * D / 2) and shared["all-gather"] == (1, 4 * B / 2 * D / 2 / 8)
    assert whole["all-reduce"] == shared["all-reduce"] and whole["all-reduce"][0] == 1
    assert traffic(text, 4, rounds=8).memory_bytes < traffic(text, 4).memory_bytes


def test_a_kernel_reads_one_layer_of_a_stack_and_a_copy_all():
    text = """
ENTRY %main (x: bf16[8,4], w: bf16[12,4,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[12,4,4]{2,1,0} parameter(1)
  %c = bf16[12,4,4]{1,2,0} copy(%w), metadata={op_name="jit(f)/one_of_3/ragged_dot"}
  ROOT %y = bf16[8,4]{1,0} custom-call(%x, %c), custom_call_target="k", metadata={op_name="jit(f)/one_of_3/ragged_dot"}
}
"""
    assert traffic(text, 1).memory_bytes == 2 * 384 + 64 + 384 / 3 + 64


def test_memory_traffic_of_a_loop_is_that_of_its_slices():
    """Scanning over stacked weights reads each layer's weights once, not the stack once per layer."""
    layers, width = 16, 256

    def fn(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    text = jax.jit(fn).lower(jnp.zeros((1, width)), jnp.zeros((layers, width, width))).compile().as_text()
    stack = 4 * layers * width * width
    assert stack <= traffic(text, 1).memory_bytes < 4 * stack


def test_memory_traffic_agrees_with_xla_where_there_is_no_loop():
    def fn(x, w):
        return jnp.tanh(x @ w) @ w.T

    compiled = jax.jit(fn).lower(jnp.zeros((256, 512)), jnp.zeros((512, 1024))).compile()
    costs = compiled.cost_analysis()
    assert traffic(compiled.as_text(), 1).memory_bytes == pytest.approx(costs["bytes accessed"], rel=0.05)


def test_the_tpu_compilers_text_is_read():
    """Loops without a written count, from 1 to 7; a fused reduce-scatter; an exchange in two parts, and one that runs
    in three pieces beside a matmul, each of which states all of it.
    """
    found = traffic(Path(__file__).with_name("tpu.hlo").read_text(), 8)
    assert found.collectives == [
        ("all-gather", ((0, 2, 4, 6), (1, 3, 5, 7)), 12, 12 * 3 * 512),
        ("reduce-scatter", ((0, 2, 4, 6), (1, 3, 5, 7)), 6, 6 * 2048 * 3 / 4),
    ]
    # The reduction reads x, the first gather writes it whole; its shard stays in the compiler's cache. The other reads
    # a slice and writes the whole, and the matmul beside it reads and writes; of its result a fusion within a fusion
    # reads a slice. And the counter.
    expected = {
        ("fusion", "", ""): [18, 6 * (2048 + 512 + 2048 + 512 + 512)],
        ("all-gather", "", ""): [6, 6 * 2048],
        ("fusion", "backward", "dot_general"): [6, 6 * 2 * 2048],
        ("slice", "", ""): [6, 6 * 2 * 512],
        ("add", "", ""): [6, 6 * 3 * 4],
    }
    assert found.operations == expected and found.memory_bytes == sum(moved for _, moved in expected.values())


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("mesh['a'=1,'b'=4,'c'=2] {'c'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=1,'b'=4,'c'=2] {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_groups_written_as_axes_of_a_mesh(written, groups):
    text = f"""
ENTRY %main (input: f32[8]) -> f32[8] {{
  %input = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%input), replica_groups={written}, use_global_device_ids=true, to_apply=%add
}}
"""
    assert traffic(text, 8).collectives == [("all-reduce", groups, 1, 2 * (1 - 1 / len(groups[0])) * 32)]
