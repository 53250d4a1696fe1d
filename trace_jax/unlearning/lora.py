"""Low-rank adaptation (LoRA, 2106.09685): weights W stay as they are, W + (alpha / rank) a b computes, a and b train.

a starts at N(0, 1/inputs) and b at zero, so the first step sees the original model. Sums are rounded to the type of W
one layer at a time, as the merged checkpoint is: what was trained is what is exported.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.models.arrays import ArraySpec, flat_specs, low_rank
from trace_jax.models.config import ModelConfig
from trace_jax.models.sharding import Adapted, merged, param_shardings
from trace_jax.parallel.sharding import storage_spec

Flat = dict[str, Any]
FACTORS = ("lora_a", "lora_b")


def factor_paths(path: str) -> tuple[str, str]:
    """Where the two factors of the parameter at `path` stand among what trains."""
    a, b = (f"{path}/{name}" for name in FACTORS)
    return a, b


def adapted_path(path: str) -> str | None:
    """The parameter that the factor at `path` adapts, or None for what is no factor."""
    parameter, _, name = path.rpartition("/")
    return parameter if name in FACTORS else None


def factors(config: ModelConfig, paths: Iterable[str], rank: int) -> dict[str, ArraySpec]:
    """Declarations of the factors of the parameters at `paths`, by path.

    Raises:
      ConfigError: a matrix has fewer than `rank` rows or columns.
    """
    declared, found = flat_specs(config), {}
    for path in sorted(paths):
        try:
            found |= zip(factor_paths(path), low_rank(declared[path], rank), strict=True)
        except ConfigError as error:
            raise ConfigError(f"lora_rank: {path}: {error} Lower unlearning.lora_rank.") from None
    return found


def factors_among(config: ModelConfig, trainable: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Declarations of the factors among `trainable` (arrays or shapes by path), by path."""
    ranks = {adapted_path(path): leaf.shape[-1] for path, leaf in trainable.items() if path.endswith(FACTORS[0])}
    return {name: spec for path, rank in ranks.items() if path for name, spec in factors(config, [path], rank).items()}


def factor_storage(config: ModelConfig, trainable: Mapping[str, Any], mesh: Mesh) -> dict[str, P]:
    """How the factors among `trainable` are stored on `mesh`: where their parameter's own axes are."""
    declared = factors_among(config, trainable)
    return {path: storage_spec(spec.shape, spec.axes, mesh.shape) for path, spec in declared.items()}


def initial_factors(config: ModelConfig, paths: Iterable[str], rank: int, *, seed: int, mesh: Mesh) -> Flat:
    """First values of all factors, each made where it lies. They depend on the seed and on the parameter's name."""
    declared = factors(config, paths, rank)
    storage = factor_storage(config, {path: spec.abstract() for path, spec in declared.items()}, mesh)

    def make(key):
        return {path: s.initialize(jax.random.fold_in(key, zlib.crc32(path.encode()))) for path, s in declared.items()}

    shardings = {path: NamedSharding(mesh, storage[path]) for path in declared}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))


def adapted(
    arrays: Mapping[str, jax.Array], trainable: Mapping[str, jax.Array], scale: jax.Array
) -> dict[str, Adapted]:
    """The adapted ones of `arrays` with their factors, in the type of the array.

    Args:
      arrays: all parameters by path.
      trainable: factors in float32 by path; what else trains is not looked at.
      scale: f32 [], alpha / rank.
    """
    result = {}
    for path in trainable:
        parameter = adapted_path(path)
        if parameter is not None and path.endswith(FACTORS[0]):
            array = arrays[parameter]
            a, b = (trainable[name] for name in factor_paths(parameter))
            result[parameter] = Adapted(array, (scale * a).astype(array.dtype), b.astype(array.dtype))
    return result


def merge(arrays: Mapping[str, jax.Array], trainable: Mapping[str, jax.Array], scale: Any, config, mesh: Mesh) -> Flat:
    """The adapted ones of `arrays` as plain arrays on the mesh: what `adapted` computes with, for good."""
    shardings = param_shardings(config, mesh)

    def layers(leaf: Adapted):
        return jax.lax.map(lambda one: merged(one.array, one.a, one.b), leaf)

    result = {}
    for path, leaf in adapted(arrays, trainable, scale).items():
        result[path] = jax.jit(layers, out_shardings=shardings[path])(leaf)
    return result
