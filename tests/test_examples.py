"""Every example that a person reads runs: in the docstring of each public name, in README and in the documentation.

Examples of docstrings go on from the world that the package's own docstring makes, and each has a copy of it.
"""

import doctest
import re
import shutil
from pathlib import Path

import pytest

import trace_jax as tj
from tests.run.toy import on_one_device, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = [name for name in tj.__all__ if name != "__version__"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
BLOCKS = {str(p.relative_to(ROOT)): re.findall(r"^```python\n(.*?)^```$", p.read_text(), re.M | re.S) for p in PAGES}
PYTHON = {page: blocks for page, blocks in BLOCKS.items() if blocks}
OF_A_RUN = {"run", "attack", "Run", "open_run", "write_report", "export"}


def run_examples(docstring, names, name):
    """Runs the examples of a docstring; what they define is added to `names`."""
    test = doctest.DocTestParser().get_doctest(docstring or "", names, name, None, 0)
    test.globs = names  # not a copy
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)
    shown = [example.want.strip() for example in test.examples if example.want or example.exc_msg]
    assert shown and "..." not in shown, f"{name}: an example shows something"
    assert not any(doctest.SKIP in example.options for example in test.examples), f"{name}: an example runs"


@pytest.fixture(scope="module")
def world(tmp_path_factory, data):
    """What the package's docstring makes, in a directory with a person's own text and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch, on_one_device():
        patch.chdir(tmp_path_factory.mktemp("examples"))
        for name in ("forget", "retain"):
            shutil.copy(data / f"{name}.jsonl", ".")
        names = {"checkpoint": str(save_checkpoint(Path("olmoe")).resolve())}
        run_examples(tj.__doc__, names, "trace_jax")
        yield names


@pytest.fixture(scope="module")
def _run(world):
    """What the example of `tj.run` leaves in the directory, for those that go on from it."""
    run_examples(tj.run.__doc__, dict(world), "run")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name, world, request):
    if name in OF_A_RUN:
        request.getfixturevalue("_run")
    if name != "run":
        run_examples(getattr(tj, name).__doc__, dict(world), name)


def execute(page):
    """Runs the Python of a page from top to bottom, on the run that is here."""
    names = {}
    for number, block in enumerate(PYTHON[page]):
        exec(compile(block.replace("runs/quickstart", "runs/mine"), f"{page}, block {number + 1}", "exec"), names)


def test_the_python_of_the_readme_unlearns_a_secret_and_keeps_the_rest(_run, capsys):
    execute("README.md")
    said = capsys.readouterr().out
    assert said.count(" opens with 21 stop") == 1 and said.count(" 4 rooms and a garden stop") == 2


def test_the_python_of_other_pages_runs(_run):
    execute("docs/tracking.md")
    elsewhere = {"docs/interop.md"}  # on a model of its own, in tests/interop/test_recipes.py
    assert PYTHON.keys() == {"README.md", "docs/tracking.md"} | elsewhere
