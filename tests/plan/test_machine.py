"""Links, nodes and rings: how fast a group of chips exchanges data."""

import itertools
import math
import types

import jax
import pytest

from trace_jax.config import ConfigError
from trace_jax.plan.machine import GPUS, TPUS, cpus, exchange_rate, gpus, here, tpu_slice

V5E, V5P, H100 = TPUS["v5e"], TPUS["v5p"], GPUS["h100"]


@pytest.mark.parametrize(
    ("chip", "shape", "group", "rate"),
    [
        (V5E, (4, 4), [0, 1, 2, 3], 50e9),  # the links along the axes that a group spans
        (V5E, (4, 4), [0, 4, 8, 12], 50e9),
        (V5E, (4, 4), range(16), 100e9),
        (V5P, (2, 2, 4), [0, 1, 2, 3], 200e9),  # in both directions where the axis closes to a ring
        (V5P, (2, 2, 4), [0, 4], 100e9),
        (V5P, (2, 2, 4), range(16), 400e9),
        (V5E, (16, 16), range(16), 100e9),
        (H100, (2, 8), range(8), 450e9),  # NVLink within a node, the network beyond
        (H100, (2, 8), [0, 8], 50e9),
    ],
)
def test_how_fast_a_group_of_chips_exchanges(chip, shape, group, rate):
    places = list(itertools.product(*map(range, shape)))
    assert exchange_rate(chip, group, places if chip.torus else [place[:1] for place in places]) == rate


def test_this_machine_is_measured_and_shared():
    assert jax.device_count() == 8  # JAX starts here if it hasn't: later the number can't be changed
    one, four = (cpus(count, "float32").chip for count in (1, 4))
    assert one.memory == 4 * four.memory
    assert four.flops > 1e7 and four.bandwidth > 1e6


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", V5E.flops), ("TPU v5p", V5P.flops), ("NVIDIA H100 80GB HBM3", H100.flops), ("Tesla T4", math.inf)],
)
def test_devices_that_are_here_have_the_memory_that_jax_says(kind, flops, monkeypatch):
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: {"bytes_limit": 123})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    target = here("bfloat16")
    assert (target.name, target.chip.memory, target.chip.flops) == (f"1 x {kind}", 123, flops)
    assert target.devices == [device]


def test_without_an_accelerator_the_processor_is_here():
    assert here("float32").chip.name == "this CPU" and len(here("float32").devices) == len(jax.devices())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gpus(8, "h10"), "known: a100, h100"),
        (lambda: tpu_slice("v5e:3x3"), "2x4"),
        (lambda: tpu_slice("v4:2x2x4"), "known: v5e, v5p, v6e"),
        (lambda: gpus(12, "h100"), "whole nodes"),
        (lambda: cpus(0, "float32"), "--cpu is 0; expected at least 1"),
        (lambda: cpus(64, "float32"), "JAX has started with 8"),
    ],
)
def test_what_there_is_not_is_an_error_that_says_what_there_is(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
