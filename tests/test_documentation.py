"""What documentation names is there: commands, configurations, files; README reads the same on a package index."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import trace_jax
from trace_jax.main import COMMANDS
from trace_jax.run.configs import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIELDS = {
    name for file in (ROOT / "trace_jax").rglob("*.py") for name in re.findall(r"^    (\w+): ", file.read_text(), re.M)
}
HERE = PROJECT["urls"]["Repository"] + "/blob/main/"


def test_readme_has_no_link_that_breaks_on_a_package_index():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith("https://")] == []
    assert HERE + "docs/start.md" in links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_lead_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    files = [ROOT / link.removeprefix(HERE) for link in links if link.startswith(HERE)]
    files += [page.parent / link for link in links if "://" not in link]
    assert [str(file) for file in files if not file.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_experiments_exist(page):
    text = re.sub(r"\\\n\s*", "", page.read_text())  # a command over several lines
    commands = set(re.findall(r"(?:trace-jax|-m trace_jax\.main) ([a-z][a-z-]+)", text))
    assert commands <= {*COMMANDS, "help"}
    for name in re.findall(r"--config (?:configs/)?([a-z_]+)", text):
        assert name in shipped_configs(), f"--config {name}"
    settings = re.findall(r"--config\.([a-z_]+(?:\.[a-z0-9_]+)+)", text)
    assert {part for setting in settings for part in setting.split(".")} <= FIELDS


def test_the_wheel_is_of_the_version_that_the_package_says():
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", trace_jax.__version__)


@pytest.mark.parametrize(
    "file", [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"], ids=lambda file: file.name
)
def test_files_for_the_forge_are_yaml(file):
    read = yaml.safe_load(file.read_text())
    if file.parent.name == "workflows":
        assert read["jobs"]["publish"]["needs"] == "build"
        assert read["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_licences_of_what_it_is_built_on_are_those_that_the_packages_say():
    rows = re.findall(r"^\| (\w[\w ]+) \| (.*) \| (.*)\|$", (ROOT / "SECURITY.md").read_text(), re.M)[1:]
    told = [{name: row[0] for row in rows for name in row[column].split(", ") if name} for column in (1, 2)]
    own = ("cuda", "gcs", "notebooks", "test", "tpu")  # of what is listed already, or for those who work on the package
    more = [d for extra, names in PROJECT["optional-dependencies"].items() if extra not in own for d in names]
    for listed, named in zip(told, (PROJECT["dependencies"], more), strict=True):
        names = [re.match(r"[\w.-]+", one).group() for one in named]
        assert {name.strip() for name in listed} == set(names)
        for name, licence in listed.items():
            try:
                about = metadata.metadata(name.strip())
            except metadata.PackageNotFoundError:
                continue
            said = [about.get("License-Expression"), about.get("License"), *(about.get_all("Classifier") or ())]
            assert licence in " ".join(filter(None, said)), name
