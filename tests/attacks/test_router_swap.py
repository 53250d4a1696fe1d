"""What was hidden by routers alone is back under the original routers; what experts have lost is not."""

import jax
import numpy as np
import pytest

from trace_jax.attacks.routers import RouterSwap, with_routers_of
from trace_jax.models.arrays import flatten, unflatten

RATIO = "forget_probability_ratio"


def changed(params, change):
    """Parameters with `change(path, array)` in the place of each array for which it is not None."""
    flat = flatten(params)
    return unflatten({path: array if (new := change(path, array)) is None else new for path, array in flat.items()})


def turned_routers(path, array):
    """The experts that a token likes least."""
    return -array if path == "layers/router" else None


def biased_routers(path, array):
    """The bias alone moves all tokens to two experts."""
    return array + np.float32([[9, 9, 0, 0]]) if path == "layers/router_bias" else None


def emptied_experts(path, array):
    return 0 * array if path == "layers/experts/down" else None


@pytest.mark.parametrize("hide", [turned_routers, biased_routers])
def test_knowledge_that_only_the_router_hid_is_back_exactly(original, make_case, value, hide, measured):
    case = make_case(RouterSwap(), changed(original.params, hide))
    hidden = measured(case)
    assert value(hidden, RATIO) < 0.9
    (point,) = case.context.attack.points(case)
    assert point.at == "original routers"
    assert point.measurements == case.context.evaluator.measure(
        case.context.evaluator.original
    )  # to the last bit: the same arrays
    assert value(point.measurements, RATIO) == 1


def test_what_experts_have_lost_is_not_back(original, make_case, value, measured):
    case = make_case(RouterSwap(), changed(original.params, emptied_experts))
    (point,) = case.context.attack.points(case)
    assert value(point.measurements, RATIO) == value(measured(case), RATIO) < 0.9


def test_only_routers_are_swapped_and_nothing_is_copied(original):
    other = jax.tree.map(lambda x: x + 1, original.params)
    swapped, own, given = flatten(with_routers_of(other, original.params)), flatten(other), flatten(original.params)
    routers = {"layers/router", "layers/router_bias"}
    assert all(swapped[path] is (given if path in routers else own)[path] for path in own)
    assert set(swapped) == set(own)
