"""What transformers computes: every module's inputs and output, caught by hooks."""

import dataclasses

import numpy as np
import torch
from tiny_checkpoints import LENGTH

LENGTHS = (LENGTH, 17, 9, 3)
MASK = np.arange(LENGTH)[None] < np.array(LENGTHS)[:, None]
TOKENS = np.where(MASK, np.random.default_rng(0).integers(3, 97, MASK.shape), 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module: its first input and its output as numpy (of a tuple: each part)."""

    module: torch.nn.Module
    inputs: tuple
    output: np.ndarray | tuple


@dataclasses.dataclass(frozen=True)
class Reference:
    """Logits [B,S,V], every layer's output [L,B,S,D], routers' (logits, weights, indices) [B,S,...], and all calls."""

    logits: np.ndarray
    layers: np.ndarray
    routers: tuple
    calls: dict

    def router(self, part):
        """[L,B,S,E or K] of all layers with experts: part 0 logits, 1 weights, 2 indices."""
        return np.stack([call.output[part].reshape(*MASK.shape, -1) for call in self.routers])


def run(model) -> Reference:
    """`model` on right-padded TOKENS, rows of unequal LENGTHS."""
    calls, handles = {}, []

    def keep(name):
        def hook(module, args, kwargs, output):
            calls[name] = Call(module, tuple(_numpy([*args, *kwargs.values()])), _numpy(output))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(keep(name), with_kwargs=True))
    logits = model(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK.astype(int))).logits
    for handle in handles:
        handle.remove()
    layers = [_first(call.output) for call in calls.values() if type(call.module).__name__.endswith("DecoderLayer")]
    routers = [call for call in calls.values() if type(call.module).__name__.endswith(("Router", "Gate"))]
    return Reference(logits.numpy(), np.stack(layers), tuple(routers), calls)


def _numpy(value):
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, (tuple, list)):
        return tuple(_numpy(item) for item in value)
    return value


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def by_expert(indices, weights):
    """Both with the chosen experts in ascending order: transformers leaves their order open."""
    order = np.argsort(indices, axis=-1)
    return np.take_along_axis(indices, order, -1), np.take_along_axis(weights, order, -1)
