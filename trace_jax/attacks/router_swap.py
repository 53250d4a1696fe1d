"""The original routers under the unlearned experts: undoes whatever was only hidden from the router's sight."""

from __future__ import annotations

from typing import Any

from trace_jax.attacks.attack import Case, Point
from trace_jax.attacks.config import RouterSwapConfig
from trace_jax.models.arrays import flatten, unflatten

_ROUTERS = ("layers/router", "layers/router_bias", "layers/router_correction")


def router_swap(settings: RouterSwapConfig, case: Case) -> list[Point]:
    """Measures the unlearned model with every router, its bias and its correction as they were before."""
    del settings
    swapped = with_routers_of(case.unlearned.params, case.original.params)
    return [Point("original routers", case.measure(swapped, "original-routers"))]


def with_routers_of(params: Any, donor: Any) -> Any:
    """`params` with the routers of another model of the same shape; every other array is shared."""
    routers = {path: array for path, array in flatten(donor).items() if path in _ROUTERS}
    return unflatten(flatten(params) | routers)
