"""Notebooks run as in CI: nothing is installed, and all is small."""

import pytest

from scripts import notebooks


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """printed(name, ...): what a notebook says with this form, run top to bottom in a directory of its own."""
    monkeypatch.setenv("CI", "true")

    def run(name, /, **form):
        cells = notebooks.run(name, tmp_path, **form).cells
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        return "\n".join(o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in outputs)

    return run
