"""Two real processes on this machine sum a number and agree; what can't start says why."""

import http.server
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from tests.two_processes import CLUSTERS, DEVICES, free_port, launch, run_processes
from trace_jax.config import ConfigError
from trace_jax.parallel import processes
from trace_jax.parallel.processes import VARIABLES, barrier, is_main, start_processes, worker_pool

ALL = [*VARIABLES, *CLUSTERS, "TPU_SKIP_MDS_QUERY", "GCE_METADATA_IP"]

SUM = """
import sys
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from trace_jax.parallel.processes import *
count = start_processes(*sys.argv[1:4], timeout=60)
index = jax.process_index()
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
numbers = jax.make_array_from_callback((4,), jax.NamedSharding(mesh, P("data")), lambda i: jnp.arange(1.0, 5.0)[i])
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x[0], "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
barrier("together")
said = count, index, is_main(), float(total(numbers)), broadcast_from_process_0(7 + index)
said += all_processes(True), all_processes(index == 0)
print("<", *said, ">")
"""


def test_two_processes_sum_a_number_and_agree():
    address = f"127.0.0.1:{free_port()}"  # arguments go before the environment, which other tests rely on
    ended = run_processes(DEVICES + SUM, [(address, 2, index) for index in range(2)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    said = [f"2 {index} {index == 0} 10.0 7 True False".split() for index in range(2)]
    assert [out[0].split() for _, out, _ in ended] == said


def test_processes_whose_others_do_not_come_end_and_say_so():
    program = "import sys; from trace_jax.parallel.processes import start_processes as s; "
    program += "s(sys.argv[1], 2, int(sys.argv[2]), timeout=2)"
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    children = [launch(program, [(address, index)])[0] for index, address in enumerate(addresses)]
    for index, words in enumerate(("not all of the other 1 came", "got no answer from the")):
        _, error = children[index].communicate(timeout=60)
        assert children[index].returncode == 2
        assert all(said in error for said in (f"process {index}", words, addresses[index], "(waited 2 s)")), error


@pytest.fixture
def alone(monkeypatch):
    """No variable of a cluster is set; starting for real would be a mistake."""
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *address, **_: started.append(address))
    return started


def test_a_single_process_starts_nothing(alone):
    assert start_processes() == start_processes("10.0.0.1:99", 1, 0) == 1
    assert alone == [] and is_main()
    barrier("nobody to wait for")


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"SLURM_NTASKS": "4"}, 1),  # of a batch script, outside srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2),
    ],
)
def test_clusters_are_recognised(alone, monkeypatch, variables, count):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert start_processes() == count and alone == [()] * (count > 1)


@pytest.mark.parametrize(("workers", "started"), [("w:0:10.0.0.1,w:1:10.0.0.2", [()]), ("w:0:10.0.0.1", [])])
def test_a_cloud_tpu_slice_is_recognised_by_its_metadata(alone, monkeypatch, workers, started):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(workers.encode())

    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        start_processes()
    assert alone == started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:99", 2, 2), "--process-id is 2 of 2 processes; expected a number from 0 to 1"),
        (("10.0.0.1:99", 2, -1), "--process-id is -1"),
        (("10.0.0.1:99", 0, 0), "of 0 processes"),
        (("10.0.0.1:99", 2, None), "--process-id I: missing; the three are given together"),
        ((None, 2, 1), "--coordinator HOST:PORT: missing"),
        (("10.0.0.1", 2, 1), "expected HOST:PORT"),
        (("10.0.0.1:99", "two", 1), "expected whole numbers"),
    ],
)
def test_contradictions_are_refused(alone, arguments, message):
    with pytest.raises(ConfigError, match=message):
        start_processes(*arguments)
    assert alone == []


STEPS = """
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
    """Keeping freed memory is a setting of the C library; it must never be an error."""
    result = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    took_effect, faults = result.stdout.split()
    if took_effect == "True":
        assert int(faults) < 3000  # otherwise over 10,000: a step's temporaries are 4 MiB


def deaf(begun):
    """Work that SIGTERM doesn't end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun.touch()
    time.sleep(600)


def failing(begun):
    while not begun.exists():
        time.sleep(0.01)
    raise OSError("no space")


def test_a_worker_that_does_not_end_when_another_fails_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SAVING", 0.5)
    began = time.monotonic()
    with pytest.raises(OSError, match="no space"), worker_pool(2) as pool:
        _, failed = [pool.submit(work, tmp_path / "begun") for work in (deaf, failing)]
        failed.result()
    assert time.monotonic() - began < 60
