"""Makes the notebooks of colab/ from their sources, runs them, and keeps a picture of each.

python scripts/notebooks.py                       # colab/NAME.py -> colab/NAME.ipynb; first cells; README's badges
CI=true python scripts/notebooks.py run NAME DIR  # runs it top to bottom in DIR, into DIR/NAME.ipynb
python scripts/notebooks.py record DIR/NAME.ipynb # keeps the picture that the cell tagged "picture" drew, from anywhere
"""

import base64
import io
import itertools
import os
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLAB, README, SETUP = ROOT / "colab", ROOT / "README.md", ROOT / "scripts" / "notebook_setup.py"
BEGIN, END = "<!-- notebooks: written by scripts/notebooks.py -->\n", "<!-- end of notebooks -->"
LARGEST = 100_000  # bytes of a picture
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
BADGES = {
    "Colab": (
        "https://colab.research.google.com/assets/colab-badge.svg",
        "https://colab.research.google.com/github/{}",
    ),
    "Kaggle": (
        "https://kaggle.com/static/images/open-in-kaggle.svg",
        "https://kaggle.com/kernels/welcome?src=https://github.com/{}",
    ),
}


def sources() -> list[Path]:
    """colab/*.py, the quickstart first."""
    return sorted(COLAB.glob("*.py"), key=lambda path: (path.stem != "quickstart", path.stem))


def made() -> dict[Path, str]:
    """What every file that this script writes is to hold."""
    texts = {path: with_setup(path.read_text()) for path in sources()}
    notebooks = {path.with_suffix(".ipynb"): notebook(text, path.stem) for path, text in texts.items()}
    return {**texts, **notebooks, README: with_badges(README.read_text(), texts)}


def with_setup(source: str) -> str:
    """The source with the shared first code cell."""
    before, cell, after = re.split(r"(?ms)^(# %%\n.*?)(?=^# %%)", source, maxsplit=1)
    return f"{before}# %%\n{SETUP.read_text()}\n{after}" if cell else source


def notebook(source: str, name: str) -> str:
    """The source as .ipynb: the same bytes every time, with the picture that the file of that name has now."""
    made = jupytext.reads(source, fmt="py:percent")
    metadata = {key: value for key, value in made.metadata.items() if key != "jupytext"}
    made.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}, **metadata})
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    path = COLAB / f"{name}.ipynb"
    if path.exists():
        picture_cell(made).outputs = picture_cell(nbformat.read(path, as_version=4)).outputs
    made.nbformat, made.nbformat_minor = 4, 5
    return nbformat.writes(made) + "\n"


def picture_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The one cell tagged "picture"."""
    (cell,) = (cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", ()))
    return cell


def record(executed: Path) -> None:
    """Keeps the picture of an executed notebook in colab/, under the same name, in fewer colours."""
    cell = picture_cell(nbformat.read(executed, as_version=4))
    (drawn,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", ()))
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGB").quantize(96).save(small, "PNG", optimize=True)
    picture = base64.b64encode(small.getvalue()).decode()
    if len(picture) > LARGEST:
        raise SystemExit(f"the picture of {executed} has {len(picture):,} bytes; at most {LARGEST:,} are kept.")
    path = COLAB / executed.name
    target = nbformat.read(path, as_version=4)
    picture_cell(target).outputs = [nbformat.v4.new_output("display_data", {"image/png": picture})]
    path.write_text(nbformat.writes(target) + "\n")


def run(name: str, directory: Path, /, **form: object) -> nbformat.NotebookNode:
    """Runs colab/NAME.ipynb there, each cell, with other values in its form, and keeps what it gave beside it.

    Raises CellExecutionError.
    """
    opened = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    for (key, value), cell in itertools.product(form.items(), opened.cells):
        cell.source = re.sub(rf"(?m)^{key} = .*(?=  # @param)", lambda _, k=key, v=value: f"{k} = {v!r}", cell.source)
    kept = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}  # figures are to be in the page
    try:
        NotebookClient(opened).execute(cwd=str(directory), env=kept | {"IPYTHONDIR": str(directory / ".ipython")})
    finally:
        nbformat.write(opened, directory / f"{name}.ipynb")
    return opened


def with_badges(readme: str, texts: dict[Path, str]) -> str:
    """README.md with a line for each notebook: its title, its first sentence, and where it opens."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    place = repository.removeprefix("https://github.com/")
    lines = ["| notebook | |", "|---|---|"]
    for path, text in texts.items():
        title, about = re.search(r"^# # (.+)\n#\n# (.+?\.)(?: |\n)", text, re.MULTILINE).groups()
        badges = (
            f"[![Open in {where}]({image})]({address.format(f'{place}/blob/main/colab/{path.stem}.ipynb')})"
            for where, (image, address) in BADGES.items()
        )
        lines.append(
            f"| [{title}](https://github.com/{place}/blob/main/colab/{path.stem}.ipynb): {about} | {' '.join(badges)} |"
        )
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            for path, text in made().items():
                path.write_text(text)
        case ["run", name, directory]:
            run(name, Path(directory).resolve())
        case ["record", executed]:
            record(Path(executed))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
