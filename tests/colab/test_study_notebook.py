"""The notebook of studies: on one that it makes, and on a run."""

from tests.run.toy import experiment, on_one_device
from trace_jax.io.files import read_json
from trace_jax.run.methods import run


def rows(latex):
    return [
        [cell.strip() for cell in line.removesuffix(r"\\").split("&")] for line in latex.splitlines() if "&" in line
    ]


def test_it_makes_a_study_and_the_table_of_a_paper(printed, tmp_path):
    said = printed("study")
    latex = (tmp_path / "table.tex").read_text()
    assert latex in said and "Where forget probability ratio first comes down to 0.9, on test: means" in latex
    header, *methods = rows(latex)
    assert header[1:3] + header[-1:] == ["setting", "seeds", "gain in mean utility"]
    assert [row[:3] for row in methods] == [[name, "alpha=4", "2 of 2"] for name in ("uniform", r"trace\_rows")]
    assert methods[0][-1] == "0.000 [0.000, 0.000]"


def test_it_reads_runs(printed, data, tmp_path):
    with on_one_device():
        made = run(experiment(data), tmp_path / "toy")
    table = read_json(made.directory / "results.json")["equal_forgetting"][0]
    printed("study", directory=str(made.directory), show="trace_rows")
    header, _, method = rows((tmp_path / "table.tex").read_text())
    reached = {name: f"{one['value']:.3f}" for name, one in table["rows"][-1]["intervals"].items()}
    assert method[:3] == [r"trace\_rows", "toy", "0"] and reached
    assert {name: method[header.index(name.replace("_", " "))].split(" ")[0] for name in reached} == reached
