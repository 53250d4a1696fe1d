"""Attacks on an unlearned model, by name: what it gives back has not been unlearned."""

import dataclasses

from trace_jax.attacks import attack
from trace_jax.attacks.prompting import Prompting
from trace_jax.attacks.routes import RouteSearch
from trace_jax.config import Section


class AttacksConfig(Section):
    """An attack is run if its section is given; `{}` takes its defaults."""

    relearning: attack.Relearning | None = None
    benign_relearning: attack.BenignRelearning | None = None
    quantization: attack.Quantization | None = None
    router_swap: attack.RouterSwap | None = None
    expert_forcing: attack.ExpertForcing | None = None
    route_search: RouteSearch | None = None
    prompting: Prompting | None = None

    @property
    def chosen(self) -> dict[str, attack.Attack]:
        """The attacks that are run, in the order of the fields."""
        sections = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: section for name, section in sections.items() if section is not None}
