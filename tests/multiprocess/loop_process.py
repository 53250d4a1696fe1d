"""One of several processes that run a toy loop on a mesh over all of them.

`python loop_process.py DIR PAUSE`; the state after step 10 is the best one, and is kept.
"""

import hashlib
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.io.signals import Interrupted
from trace_jax.parallel.mesh import place
from trace_jax.parallel.processes import start_processes
from trace_jax.unlearning.loop import Evaluated, Hook, Loop, Rules, TrainState

STEPS = 60


def main(directory: str, pause: str) -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    start_processes(timeout=60)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))

    def start():
        w = np.random.default_rng(0).normal(size=1 << 12).astype(np.float32)  # large enough for files of its own
        state = TrainState(np.int32(0), {"w": w}, {"m": w * 0})
        return place(state, mesh, TrainState(P(), {"w": P("data")}, {"m": P("data")}))

    @jax.jit
    def step(state, x):
        m = state.optimizer["m"] * 0.9 + state.trainable["w"] * x
        w = state.trainable["w"] - 0.1 * m
        return TrainState(state.step + 1, {"w": w}, {"m": m}), {"loss": jnp.sum(w)}

    def inputs(i):
        time.sleep(float(pause))
        return place(np.float32(0.01 * i), mesh), {}

    @jax.jit
    def squares(w):
        return jnp.sum(w * w)

    def evaluate(_, trainable):
        return Evaluated({}, 0.0, -abs(float(squares(trainable["w"])) ** 0.5 - 55.0))

    rules = Rules(keep={"name": "best_utility", "forgetting": 0.0})
    loop = Loop(Path(directory), "a", STEPS, 5, "toy", evaluation=Hook(5, evaluate), rules=rules)
    try:
        result = loop.run(start, inputs, step)
    except Interrupted as error:
        return 128 + error.signal
    print("RESULT step", result.step, flush=True)
    for shard in result.trainable["w"].addressable_shards:
        print("RESULT", shard.index[0].start, hashlib.sha256(np.asarray(shard.data)).hexdigest(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
