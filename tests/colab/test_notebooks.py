"""Notebooks are what their sources make; their first cell says of any runtime what it has, lacks, and must do next."""

import base64
import importlib.metadata
import subprocess
import sys
import tomllib
import types

import nbformat
import pytest

import trace_jax
from scripts import notebooks
from trace_jax.plan.machine import TPUS

PROJECT = tomllib.loads((notebooks.ROOT / "pyproject.toml").read_text())["project"]
SETUP = compile(notebooks.SETUP.read_text(), str(notebooks.SETUP), "exec")
VERSIONS = {  # Colab's TPU runtime of August 2026
    "jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21.1", "numpy": "2.1.3", "flax": "0.11.2", "optax": "0.2.8",
    "orbax-checkpoint": "0.12.4", "grain": "0.2.18", "transformers": "5.20.1",
}  # fmt: skip
NEW = VERSIONS | {
    "jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42", "flax": "0.12.8", "orbax-checkpoint": "0.12.8",
    "trace-jax": "0.1.0",
}  # fmt: skip
TPU = {"TPU_ACCELERATOR_TYPE": "v5e-1", "COLAB_RELEASE_TAG": "release-colab"}


def test_notebooks_their_first_cells_and_the_badges_are_what_the_sources_make():
    for path, text in notebooks.made().items():
        assert path.read_text() == text, f"{path.name} is not up to date: python scripts/notebooks.py"


@pytest.mark.parametrize("path", notebooks.sources(), ids=lambda path: path.stem)
def test_a_notebook_is_without_outputs_but_for_one_small_picture(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [list(output.data) for output in outputs] == [["image/png"]]
    picture = outputs[0].data["image/png"]
    assert len(picture) <= notebooks.LARGEST and base64.b64decode(picture).startswith(b"\x89PNG")


@pytest.fixture
def set_up(monkeypatch, capsys):
    """The first cell in a runtime of these versions, which pip turns into `after`: (what it says, packages, values)."""

    def run(before, after=NEW, *, loaded=(), environment=TPU, gpu="", failure=""):
        present, packages, values = [before], [], {}

        def version(name):
            if name not in present[-1]:
                raise importlib.metadata.PackageNotFoundError(name)
            return present[-1][name]

        def command(words, **_):
            if "pip" in words:
                present.append(after)
                packages.extend(words[6:])
            return types.SimpleNamespace(returncode="pip" in words and bool(failure), stdout=gpu, stderr=failure)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(subprocess, "run", command)
        monkeypatch.setattr("shutil.which", lambda _: gpu or None)
        for name in ("jax", "numpy", "flax", "optax", "orbax", "grain", "transformers", "trace_jax"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name, held in dict(loaded).items():
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__=held))
        for name in ("CI", *TPU):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            exec(SETUP, values)
        except SystemExit as error:
            return capsys.readouterr().out + str(error), packages, values
        return capsys.readouterr().out, packages, values

    return run


def test_the_first_cell_needs_what_the_package_needs(set_up):
    _, _, values = set_up(NEW)
    needed = {f"{name}{bounds}" for name, bounds in values["NEEDED"].items()}
    assert values["VERSION"] == trace_jax.__version__ and values["PYTHON"] == PROJECT["requires-python"]
    assert needed == {line for line in PROJECT["dependencies"] if line.split(">")[0] in values["NEEDED"]}
    assert {f"jax[tpu]{values['NEEDED']['jax']}"} == set(PROJECT["optional-dependencies"]["tpu"])
    memory = {kind: chip.memory / 2**30 for kind, chip in TPUS.items()}
    assert values["TPU_MEMORY"] == memory | {"v5litepod": memory["v5e"]}


def test_colabs_jax_is_replaced_and_a_restart_is_asked_for_where_it_was_loaded(set_up):
    said, packages, _ = set_up(VERSIONS)
    assert "jax               0.7.2        needed >=0.10.2,<0.13     too old" in said
    assert packages == ["trace-jax[tpu]==0.1.0"] and "TPU v5e-1, 15.75 GiB a chip" in said
    assert "jax: 0.7.2 -> 0.10.2\n" in said and said.endswith("No restart needed: go on.\n")
    said, _, _ = set_up(VERSIONS, loaded={"jax": "0.7.2", "numpy": "2.1.3"})
    assert "RESTART NEEDED (Runtime > Restart session): this process still has the old jax, jaxlib, libtpu." in said
    said, _, _ = set_up(NEW, loaded={"jax": "0.7.2"}, environment={})
    assert "RESTART NEEDED (restart the kernel): this process still has the old jax." in said
    said, _, _ = set_up(NEW, loaded={"jax": "0.10.2", "trace_jax": "0.1.0"})
    assert said.endswith("No restart needed: go on.\n") and "too old" not in said and "->" not in said


def test_the_first_cell_installs_for_the_device_it_finds(set_up):
    said, packages, _ = set_up(VERSIONS, environment={})
    assert packages == ["trace-jax==0.1.0"] and "CPU only" in said
    said, packages, _ = set_up(VERSIONS, environment={}, gpu="NVIDIA L4, 22500, 580.65\nNVIDIA L4, 22500, 580.65\n")
    assert packages == ["trace-jax[cuda]==0.1.0"] and "2 x NVIDIA L4, 22.0 GiB free" in said
    said, packages, _ = set_up(VERSIONS, environment={}, gpu="Tesla T4, 15000, 550.54\n")
    assert packages == ["trace-jax==0.1.0", "jax[cuda12]>=0.10.2,<0.13"] and "too old for CUDA 13" in said


def test_the_first_cell_ends_the_run_where_nothing_can_be_installed_and_installs_nothing_in_ci(set_up, monkeypatch):
    said, _, _ = set_up(VERSIONS, VERSIONS, failure="no matching distribution")
    assert said.endswith("pip could not install it (see install_from, above):\nno matching distribution")
    said, packages, _ = set_up({}, {}, environment={"CI": "true"})
    assert not packages and "nothing is installed" in said and "needed >=0.10.2,<0.13     missing" in said
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    said, packages, _ = set_up(VERSIONS)
    assert not packages and said.endswith("has Python 3.10.4, and >=3.11 is needed: choose a newer runtime version.")
