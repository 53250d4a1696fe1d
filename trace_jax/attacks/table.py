"""The attacks by name, as `AttacksConfig` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trace_jax.attacks.attack import Attack, Case, strongest
from trace_jax.attacks.config import AttacksConfig, PromptingConfig
from trace_jax.attacks.expert_forcing import expert_forcing
from trace_jax.attacks.prompting import forms_of, prompting
from trace_jax.attacks.quantization import quantization
from trace_jax.attacks.queries import read_paraphrases
from trace_jax.attacks.relearning import benign_relearning, relearning
from trace_jax.attacks.router_swap import router_swap
from trace_jax.config import Section, as_dict
from trace_jax.data.sources import read_source, revision_of
from trace_jax.evaluation.likelihood import NonFiniteScore

ATTACKS: Mapping[str, Attack] = {
    "relearning": relearning,
    "benign_relearning": benign_relearning,
    "quantization": quantization,
    "router_swap": router_swap,
    "expert_forcing": expert_forcing,
    "prompting": prompting,
}


def check_attacks(config: AttacksConfig | None) -> None:
    """Looks whether the text that attacks are to read is there, long before they do.

    Raises:
      DataError: it isn't, or has another form.
    """
    if config is not None and config.benign_relearning is not None and config.benign_relearning.source is not None:
        read_source(config.benign_relearning.source)
    if config is not None and config.prompting is not None and config.prompting.paraphrases is not None:
        read_paraphrases(config.prompting.paraphrases)


def check_case(settings: Section, case: Case) -> None:
    """Looks whether an attack can be made, before there is an unlearned model; the case may have the original's.

    Raises:
      ConfigError: it asks for more than the model reads at once, or than there is.
    """
    if isinstance(settings, PromptingConfig):
        forms_of(settings, case)


def text_read_by(settings: Section) -> list[str]:
    """Revisions of the texts of his own that a user has an attack read: those of another one make it anew."""
    sources = (getattr(settings, name, None) for name in ("source", "paraphrases"))
    return [revision_of(source) for source in sources if source]


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
    measure = case.evaluator.board.forgetting
    return {
        "settings": as_dict(settings),
        "points": [point.to_json() for point in points],
        "measure": measure,
        "strongest": strongest(points, measure),
        "failed": failed,
    }
