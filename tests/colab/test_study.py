"""The notebook of studies: on one that it makes, and on a run."""

from tests.run.toy import experiment, on_one_device
from trace_jax.run.methods import run


def rows(latex):
    return [
        [cell.strip() for cell in line.removesuffix(r"\\").split("&")] for line in latex.splitlines() if "&" in line
    ]


def test_it_makes_a_study_and_the_table_of_a_paper(printed, tmp_path):
    said = printed("study")
    latex = (tmp_path / "table.tex").read_text()
    assert latex in said and "where forget probability ratio first comes down to 0.9: means" in latex
    header, *methods = rows(latex)
    assert header[1:3] + header[-1:] == ["setting", "seeds", "gain in mean utility"]
    assert [row[:3] for row in methods] == [[name, "alpha=4", "2 of 2"] for name in ("uniform", r"trace\_rows")]
    assert methods[0][-1] == "0.000 [0.000, 0.000]"


def test_it_reads_a_run(printed, data, tmp_path):
    with on_one_device():
        measured = run(experiment(data), tmp_path / "toy").metrics()
    printed("study", directory=str(tmp_path / "toy"), show="trace_rows")
    header, *methods = rows((tmp_path / "table.tex").read_text())
    last = measured.set_index(["method", "step", "split", "name"]).loc["trace_rows", 6, "test", "general_utility"]
    assert methods[1][:3] == [r"trace\_rows", "toy", "0"]
    assert methods[1][header.index("general utility")] == f"{last.value:.3f} [{last.low:.3f}, {last.high:.3f}]"
