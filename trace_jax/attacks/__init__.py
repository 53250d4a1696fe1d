"""Attacks on an unlearned model, by name: what it gives back has not been unlearned."""

import dataclasses

from trace_jax.attacks.attack import Attack
from trace_jax.attacks.parameters import ExpertForcing, Quantization, RouterSwap
from trace_jax.attacks.prompting import Prompting
from trace_jax.attacks.relearning import BenignRelearning, Relearning
from trace_jax.config import Section


class AttacksConfig(Section):
    """An attack is run if its section is given; `{}` takes its defaults."""

    relearning: Relearning | None = None
    benign_relearning: BenignRelearning | None = None
    quantization: Quantization | None = None
    router_swap: RouterSwap | None = None
    expert_forcing: ExpertForcing | None = None
    prompting: Prompting | None = None

    @property
    def chosen(self) -> dict[str, Attack]:
        """The attacks that are run, in the order of the fields."""
        attacks = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: attack for name, attack in attacks.items() if attack is not None}
