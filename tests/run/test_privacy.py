"""What a run's directory says of the text that it forgets, and to whom."""

import itertools
import os
import shutil
import stat

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.run.toy import experiment
from tests.tiny import write_lines
from trace_jax.io.files import read_arrays
from trace_jax.run.methods import run

LENGTH = 4  # words in a row that give a text away
LETTERS = "aeiouklmnprst"


@pytest.fixture
def own(data, tmp_path):
    """(folder of a run's data, texts of the forget set, whose words are in no other)."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    shutil.copytree(data, folder)
    texts = [" ".join("".join(rng.choice([*LETTERS], 4)) for _ in range(40)) for _ in range(8)]
    write_lines(folder / "forget.jsonl", [{"text": text} for text in texts])
    return folder, texts


def pieces(items):
    return {tuple(items[i : i + LENGTH]) for i in range(len(items) - LENGTH + 1)}


def told(path, texts):
    """Files below `path` in which a piece of a text stands, or its tokens in an array."""
    tokenizer = Tokenizer.from_file(str(path / "target" / "tokenizer.json"))
    said = {" ".join(piece) for text in texts for piece in pieces(text.split())}
    tokens = set(itertools.chain.from_iterable(pieces(tokenizer.encode(text).ids) for text in texts))
    found = set()
    for file in (file for file in path.rglob("*") if file.is_file()):
        plain = " ".join(file.read_text(errors="replace").split())
        arrays = read_arrays(file).values() if file.suffix == ".npz" else ()
        numbers = [a.ravel().tolist() for a in arrays if np.issubdtype(a.dtype, np.integer)]
        if any(piece in plain for piece in said) or any(pieces(row) & tokens for row in numbers):
            found.add(file.relative_to(path).as_posix())
    return found


def test_forget_text_stands_on_the_page_and_in_items_of_scores_and_nowhere_if_asked_or_hazardous(own, tmp_path):
    folder, texts = own
    settings = {"methods": ["uniform"], "attacks": {"relearning": {"steps": (1,)}, "router_swap": {}}}
    run(experiment(folder, **settings), tmp_path / "loud")
    scores = {"scores/target", "methods/uniform/scores", "methods/uniform/attacks/router_swap/original-routers"}
    assert told(tmp_path / "loud", texts) == {"report.html", *(f"{place}/verbatim.items.jsonl" for place in scores)}
    routed = read_arrays(tmp_path / "loud" / "statistics" / "forget.npz")
    assert {name: array.size for name, array in routed.items()} == {
        "counts": 8, "affinity": 8, "tokens": 1, "top_k": 1, "layers": 2
    }, "two layers of four experts"  # fmt: skip

    run(experiment(folder, **settings, evaluation={"audit_text": False}), tmp_path / "quiet")
    run(experiment(folder.rename(tmp_path / "wmdp"), **settings), tmp_path / "hazardous")
    assert not told(tmp_path / "quiet", texts) and not told(tmp_path / "hazardous", texts)


def test_files_are_for_whom_the_umask_says(data, tmp_path):
    before = os.umask(0o027)
    try:
        run(experiment(data, methods=["uniform"]), tmp_path / "run")
    finally:
        os.umask(before)
    modes = {}
    for file in (tmp_path / "run").rglob("*"):
        modes.setdefault((file.is_dir(), stat.S_IMODE(file.stat().st_mode)), []).append(file.name)
    assert modes.keys() == {(True, 0o750), (False, 0o640)}, modes
