"""Layouts: what the strings mean, and that both ways through them undo each other."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_jax.checkpoints.parts import Slot, copy_tiled, parse_layout

LETTERS = "abcdefgh"


@st.composite
def layouts(draw):
    """(text, shape of the parameter, letters that number tensors)"""
    count = draw(st.integers(1, 5))
    disk = draw(st.permutations(LETTERS[:count]))
    separate = tuple(disk[: draw(st.integers(0, count - 1))])
    left, rest = list(separate), list(disk[len(separate) :])
    while rest:
        group = [rest.pop(0) for _ in range(draw(st.integers(1, len(rest))))]
        left += ["1"] * draw(st.booleans())
        left.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
    axes = draw(st.permutations(disk))
    shape = tuple(draw(st.integers(1, 4)) for _ in axes)
    return f"{' '.join(left)} -> {' '.join(axes)}", shape, separate


def slot_of(text, shape, separate=()):
    return Slot("", None, (), "plain", **parse_layout(text, shape, separate))


def to_params(layout, disk):
    return disk.reshape(layout.shape).transpose(layout.order)


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_both_ways_undo_each_other(case):
    text, shape, separate = case
    layout = slot_of(text, shape, separate)
    params = np.arange(math.prod(shape)).reshape(shape)
    disk = layout.apart(params).reshape(*layout.shape[: len(separate)], *layout.tensor_shape)
    np.testing.assert_array_equal(to_params(layout, disk), params)


def test_letters_share_an_axis_slowest_first_number_tensors_or_exist_on_disk_only():
    layout, disk = slot_of("(h c) d -> d h c", (5, 2, 3)), np.arange(30).reshape(6, 5)
    assert layout.tensor_shape == (6, 5)
    for h, c in np.ndindex(2, 3):
        np.testing.assert_array_equal(to_params(layout, disk)[:, h, c], disk[3 * h + c])
    layout, disk = slot_of("e g f d -> e d g f", (4, 5, 2, 3), ("e", "g")), np.arange(120).reshape(4, 2, 3, 5)
    assert layout.tensor_shape == (3, 5)
    np.testing.assert_array_equal(to_params(layout, disk)[3, :, 1, 2], disk[3, 1, 2])
    assert slot_of("1 e -> e", (4,)).tensor_shape == (1, 4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([1, 5, 128, 129, 256, 300]),
    st.randoms(use_true_random=False),
)
def test_a_tiled_copy_is_a_copy(leading, last, random):
    shape = (*leading, last)
    order = random.sample(range(len(shape)), len(shape))
    source = np.random.default_rng(0).integers(0, 60000, shape, np.uint16)
    target = np.zeros([shape[axis] for axis in order], np.uint16)
    copy_tiled(source, target.transpose(np.argsort(order)))
    np.testing.assert_array_equal(target, source.transpose(order))
