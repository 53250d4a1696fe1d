"""The notebook of the parts in Python, as a stranger runs it."""

import nbformat

from scripts import notebooks


def test_it_runs_and_what_it_prints_is_there(printed):
    said = printed("python_api")
    assert "calibration: closes " in said and "in the text" in said


def test_texts_to_a_plot_are_twenty_five_lines():
    cells = nbformat.read(notebooks.COLAB / "python_api.ipynb", as_version=4).cells
    _, *sources = (cell.source for cell in cells if cell.cell_type == "code")
    lines = [line for source in sources for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert 20 <= len(lines) <= 25
