"""A model as a Flax module and back. Whoever uses neither never imports Flax's NNX."""

from typing import Any

import jax
from flax import nnx

from trace_jax.checkpoints.checkpoint import check_arrays
from trace_jax.models.architecture import flat_specs, flatten
from trace_jax.models.decoder import ModelOutput, forward
from trace_jax.models.model import Model


class Decoder(nnx.Module):
    """What `as_nnx` makes: every parameter is an `nnx.Param` under the name that it has in the model."""

    def __init__(self, model: Model):
        self.params = _boxed(model.params)
        self.model = nnx.static(model.replace(params=None))  # all else; no part of the state

    def __call__(self, tokens: jax.Array, *, collect: tuple = ("logits", "router"), **options: Any) -> ModelOutput:
        """`tj.forward` of tokens i32 [B, S], with its options."""
        return forward(_unboxed(self.params), self.model.config, tokens, collect=collect, **options)


def as_nnx(model: Model) -> Decoder:
    """The model as an `nnx.Module` whose call is `tj.forward`, and whose state is the model's own arrays, as they lie.

    The call takes tokens i32 [B, S], as a JAX array, and the options of `tj.forward`. It returns logits f32 [B, S, V]
    and all that routers decide, or what `collect` names. `decoder.params["layers"]["router"]` is one `nnx.Param` of all
    layers. Nothing is copied: a step that donates the module's state deletes the model's arrays too.

    Raises:
      ValueError: the model has a guide.

    Example:
      >>> from flax import nnx
      >>> decoder = tj.as_nnx(model)
      >>> out = nnx.jit(lambda decoder, tokens: decoder(tokens))(decoder, retain.tokens[:2])
      >>> out.logits.shape == (2, retain.tokens.shape[1], model.config.vocab_size)
      True
    """
    return Decoder(model.replace(params=model.unguided("a Flax module")))


def from_nnx(module: nnx.Module) -> Model:
    """The model that a module of `as_nnx` is by now, with the configuration, tokenizer, marks and source of the first.

    Again nothing is copied. A module that was put together from other state (`nnx.merge`) will do.

    Raises:
      TypeError: another module.  ValueError: parameters of other names, shapes or types than the configuration has.

    Example:
      >>> tj.from_nnx(tj.as_nnx(model)).params["embed"] is model.params["embed"]
      True
    """
    if not isinstance(module, Decoder):
        raise TypeError(f"module is a {type(module).__name__}; expected a module that tj.as_nnx(model) made.")
    params = _unboxed(module.params)
    check_arrays("the module", flatten(params), flat_specs(module.model.config))
    return module.model.replace(params=params)


def _boxed(params: Any) -> nnx.Dict:
    return nnx.Dict({key: _boxed(x) if isinstance(x, dict) else nnx.Param(x) for key, x in params.items()})


def _unboxed(params: nnx.Dict) -> dict:
    return {key: _unboxed(x) if isinstance(x, nnx.Dict) else x.get_value() for key, x in params.items()}
