"""What devices send each other is what docs/scaling.md says, to the byte."""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from tests.tiny import mesh_of, random_params
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.mesh import BATCH_AXES
from trace_jax.plan.hlo import traffic

V, D, H, C, E, K, F = 64, 16, 4, 8, 8, 2, 12
ROWS_OF_DEVICE, LENGTH = 2, 8


def test_bytes_of_the_forward_pass():
    layers = 6  # a loop
    config = ModelConfig(
        vocab_size=V, hidden_size=D, num_layers=layers, num_heads=H, num_kv_heads=H, head_size=C,
        num_experts=E, experts_per_token=K, expert_hidden_size=F,
    )  # fmt: skip
    mesh = mesh_of(2, 2, 1)
    params = placed_params(random_params(config), config, mesh)
    tokens = np.zeros((4 * ROWS_OF_DEVICE, LENGTH), np.int32)

    def run(params, tokens):
        return forward(params, config, tokens, collect=("hidden",)).hidden

    program = jax.jit(on_mesh(run, config, mesh, out_specs=P(BATCH_AXES))).lower(params, tokens).compile()
    sent = dict.fromkeys(("all-gather", "reduce-scatter"), 0.0)
    for collective in traffic(program.as_text(), 4)[1]:
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.bytes

    over_all = V * D + layers * (4 * D * H * C + D * E)  # embedding; q, k, v, o; router
    over_data = layers * E // 2 * 3 * D * F  # one device's experts
    shown = layers * ROWS_OF_DEVICE * LENGTH * (D + 2 * K)  # tokens, indices, gates, to the one other device
    assert sent == {
        "all-gather": 4 * (over_all * 3 / 4 + over_data / 2 + shown),
        "reduce-scatter": 4 * layers * ROWS_OF_DEVICE * LENGTH * D,
    }
