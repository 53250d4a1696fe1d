"""The attacks by name, as `AttacksConfig` has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trace_jax.attacks.attack import Attack, Case, strongest
from trace_jax.attacks.config import PromptingConfig
from trace_jax.attacks.expert_forcing import expert_forcing
from trace_jax.attacks.prompting import forms_of, prompting
from trace_jax.attacks.quantization import quantization
from trace_jax.attacks.queries import read_paraphrases
from trace_jax.attacks.relearning import benign_relearning, relearning
from trace_jax.attacks.router_swap import router_swap
from trace_jax.config import Section, as_dict
from trace_jax.data.sources import read_source, revision_of
from trace_jax.evaluation.benchmarks import scoreboard
from trace_jax.evaluation.likelihood import NonFiniteScore

ATTACKS: Mapping[str, Attack] = {
    "relearning": relearning,
    "benign_relearning": benign_relearning,
    "quantization": quantization,
    "router_swap": router_swap,
    "expert_forcing": expert_forcing,
    "prompting": prompting,
}
# Settings that name a text of the user's own, and what reads it.
_OWN_TEXTS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "benign_relearning": ("source", read_source),
    "prompting": ("paraphrases", read_paraphrases),
}


def own_text(name: str, settings: Any) -> str | None:
    """The text of the user's own that an attack reads, if any."""
    return getattr(settings, _OWN_TEXTS[name][0]) if name in _OWN_TEXTS else None


def check_text(name: str, settings: Section) -> None:
    """Looks whether the text that an attack is to read is there, long before it does.

    Raises:
      DataError: it isn't, or has another form.
    """
    if source := own_text(name, settings):
        _OWN_TEXTS[name][1](source)


def check_case(settings: Section, case: Case) -> None:
    """Looks whether an attack can be made, before there is an unlearned model; the case may have the original's.

    Raises:
      ConfigError: it asks for more than the model reads at once, or than there is.
    """
    if isinstance(settings, PromptingConfig):
        forms_of(settings, case)


def text_read_by(name: str, settings: Section) -> list[str]:
    """Revisions of the texts of the user's own that an attack reads: another one makes it anew."""
    source = own_text(name, settings)
    return [revision_of(source)] if source else []


def attack(name: str, settings: Section, case: Case) -> dict[str, Any]:
    """Attacks a model. Returns the content of NAME.json.

    Its "points" are the forms of the attack; "strongest" is the place of the one at which `measure`, the forgetting
    measure, is largest on test, or None. An attack that breaks the model has no points, and "failed" says why.
    """
    failed = ""
    try:
        points = ATTACKS[name](settings, case)
    except NonFiniteScore as error:
        points, failed = [], str(error)
    measure = scoreboard(case.data.benchmark).forgetting
    return {
        "settings": as_dict(settings),
        "points": [point.to_json() for point in points],
        "measure": measure,
        "strongest": strongest(points, measure),
        "failed": failed,
    }
