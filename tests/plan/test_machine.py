"""Links, nodes and rings: how fast a group of chips exchanges data."""

import itertools

import pytest

from trace_jax.config import ConfigError
from trace_jax.plan.machine import GPUS, TPUS, cpus, exchange_rate, gpus, tpu_slice


def slice_places(*shape):
    return list(itertools.product(*map(range, shape)))


def test_a_group_uses_the_links_along_the_axes_that_it_spans():
    v5e, places = TPUS["v5e"], slice_places(4, 4)
    row, column = [0, 1, 2, 3], [0, 4, 8, 12]
    assert exchange_rate(v5e, row, places) == exchange_rate(v5e, column, places) == 50e9
    assert exchange_rate(v5e, range(16), places) == 100e9


def test_an_axis_that_closes_to_a_ring_is_used_in_both_directions():
    places = slice_places(2, 2, 4)
    assert exchange_rate(TPUS["v5p"], [0, 1, 2, 3], places) == 200e9
    assert exchange_rate(TPUS["v5p"], [0, 4], places) == 100e9
    assert exchange_rate(TPUS["v5p"], range(16), places) == 400e9
    assert exchange_rate(TPUS["v5e"], range(16), slice_places(16, 16)) == 100e9


def test_gpus_leave_nvlink_when_they_leave_their_node():
    places = [(number // 8,) for number in range(16)]
    assert exchange_rate(GPUS["h100"], range(8), places) == 450e9
    assert exchange_rate(GPUS["h100"], [0, 8], places) == 50e9


def test_this_machine_is_measured_and_shared():
    one, four = (cpus(count, "float32").chip for count in (1, 4))
    assert one.memory == 4 * four.memory
    assert four.flops > 1e7 and four.bandwidth > 1e6


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gpus(8, "h10"), "known: a100, h100"),
        (lambda: tpu_slice("v5e:3x3"), "2x4"),
        (lambda: tpu_slice("v4:2x2x4"), "known: v5e, v5p, v6e"),
        (lambda: gpus(12, "h100"), "whole nodes"),
        (lambda: cpus(64, "float32"), "JAX has started with 8"),
    ],
)
def test_what_there_is_not_is_an_error_that_says_what_there_is(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
