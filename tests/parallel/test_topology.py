"""Chips, hosts and names of TPU slices, as Google's tables list them."""

import pytest

from trace_jax.config import ConfigError
from trace_jax.parallel.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator_type", "machine_type"),
    [
        ("v5e:1x1", 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
        ("v5e:4x4", 16, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("v6e:2x4", 8, 1, "v6e-8", "ct6e-standard-8t"),
        ("v5p:2x2x1", 4, 1, "v5p-8", "ct5p-hightpu-4t"),
        ("v5p:2x2x4", 16, 4, "v5p-32", "ct5p-hightpu-4t"),
        ("v5p:16x16x24", 6144, 1536, "v5p-12288", "ct5p-hightpu-4t"),
        ("v4:4x4x8", 128, 32, "v4-256", "ct4p-hightpu-4t"),
    ],
)
def test_slices(name, chips, hosts, accelerator_type, machine_type):
    topology = parse_topology(f" {name.upper()} ")
    assert f"{topology.kind}:{topology.shape}" == name and topology.gke_accelerator.startswith("tpu-v")
    assert (topology.name, topology.chips, topology.hosts) == (name, chips, hosts)
    assert (topology.accelerator_type, topology.machine_type) == (accelerator_type, machine_type)
    assert topology.chips_per_host * topology.hosts == chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", "no kind of TPU known here .*did you mean 'v5"),
        ("h100:8", "no kind of TPU"),
        ("v5e", "expected v5e: and the shape.*4x4"),
        ("v5e:3x3", "one of 1x1, 2x2"),
        ("v5p:4x4x2", "2x2x4.*multiples of 4"),
        ("v5p:16x16x28", "up to 6144 chips"),
        ("v5p:0x4x4", "2x2x4"),
    ],
)
def test_what_is_no_slice_is_refused_with_what_there_is(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)
