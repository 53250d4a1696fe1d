"""Notebooks run as in CI: nothing is installed, and all is small."""

import pytest

from scripts import notebooks


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """printed(name): the notebook run top to bottom on CPU in an empty directory; what its cells wrote, as one text."""
    monkeypatch.setenv("CI", "true")

    def run(name):
        cells = notebooks.run(name, tmp_path).cells
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        return "\n".join(o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in outputs)

    return run
