"""Keeping freed memory is a setting of the C library; it must never be an error."""

import subprocess
import sys

PROGRAM = """
from trace_jax.parallel.processes import keep_freed_memory
took_effect = keep_freed_memory()
import resource, jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x))
x = jnp.ones((1024, 1024))
for _ in range(5):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step(x).block_until_ready()
print(took_effect, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_steps_stop_faulting_once_memory_is_kept():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    took_effect, faults = result.stdout.split()
    if took_effect == "True":
        assert int(faults) < 3000  # otherwise over 10,000: a step's temporaries are 4 MiB
