"""The reference of settings: docs/settings.md is what the declarations say, and the terminal shows a part of it.

To write docs/settings.md again after a change that is meant: TRACE_JAX_WRITE_GOLDEN=1 pytest THIS_FILE
"""

import os
from pathlib import Path

from scripts.settings_page import settings_page
from trace_jax.config import as_dict
from trace_jax.main import main
from trace_jax.run.experiment import load_config
from trace_jax.run.settings import settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_what_the_declarations_say():
    if os.environ.get("TRACE_JAX_WRITE_GOLDEN"):
        PAGE.write_text(settings_page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "write it again as this file says"


def test_every_setting_of_an_experiment_is_there():
    def paths(values, path):
        inner = {key: value for key, value in values.items() if key not in ("name", "benchmark") or not path}
        for key, value in inner.items():
            yield from paths(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"]

    listed = {setting.path for setting in settings()}
    listed |= {path.rpartition(".")[0] for path in listed}  # sections that are None
    given = set(paths(as_dict(load_config("configs/quickstart.py:attacks")), ""))
    assert len(given) > 100 and given <= listed


def test_the_terminal_shows_what_is_under_a_name(capsys):
    assert main(["settings", "unlearning.objective"]) == 0
    out = capsys.readouterr().out
    assert "unlearning.objective = gradient_difference    [gradient_ascent, gradient_difference, " in out
    assert "unlearning.objective.nll_ceiling = " in out and "unlearning.alpha" not in out
    assert main(["settings", "alpha"]) == 0
    assert "unlearning.alpha = 16.0    [a number, at least 0]\n    coefficient of the retain" in capsys.readouterr().out
    assert main(["settings", "unlerning"]) == 2
    assert "no setting 'unlerning'; did you mean 'unlearning'?" in capsys.readouterr().err
