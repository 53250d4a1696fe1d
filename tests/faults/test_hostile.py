"""Files that somebody else made: whatever is in them, an error is a sentence, and little memory is taken.

FUZZ_CASES=2000 tries that many of each; cases are derived from the tests' own names, the same every time.
"""

import contextlib
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.report.test_report import CONFIG, Outline, attack, method, results, row
from tests.run.toy import experiment
from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.pretrained import read_tokenizer
from trace_jax.data.sources import read_source
from trace_jax.io.files import read_arrays, read_json, read_lines, run_stage
from trace_jax.main import main
from trace_jax.models.families import FAMILIES, model_config
from trace_jax.report.page import render
from trace_jax.routing.captures import read_capture

CASES = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "15")), derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MEGABYTE = 1 << 20
WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats() | WORD | st.sampled_from([2**63, -(2**70), 1e308, "../x"])
)
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORD, inner, max_size=4))
BYTES = st.binary(max_size=300)


@contextlib.contextmanager
def a_sentence_at_most(file: Path | None = None):
    """Within it an error has a message of its own, and what is taken of memory is at most twice the file and a bit."""
    tracemalloc.start()
    try:
        yield
    except (ValueError, OSError) as error:
        assert str(error).strip() and "\n  File" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 * (file.stat().st_size if file is not None and file.is_file() else 0) + 8 * MEGABYTE


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """A valid file with a part replaced, cut out or put in."""
    places = st.integers(0, len(content))
    return st.builds(lambda a, b, new: content[: min(a, b)] + new + content[max(a, b) :], places, places, BYTES)


@CASES
@given(st.data())
def test_lines_of_json(tmp_path_factory, data):
    good = b'{"text": "river stone"}\n{"question": "apple?", "answer": "cloud"}\n'
    lines = st.lists(JSON | st.fixed_dictionaries({"text": JSON}), min_size=1, max_size=4)
    made = lines.map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
    file = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    file.write_bytes(data.draw(BYTES | mutated(good) | made))
    with a_sentence_at_most(file):
        documents, _ = read_source(str(file))
        assert documents and all(isinstance(document.text, str) for document in documents)


def safetensors(header: bytes, claimed: int, body: bytes) -> bytes:
    return (claimed % 2**64).to_bytes(8, "little") + header + body


SHAPE = st.lists(st.integers(-2, 5) | st.sampled_from([2**31, 2**40, 2**62, 25 * 10**9]), max_size=3)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F4", "COMPLEX", 3]),
        "shape": SHAPE,
        "data_offsets": st.lists(st.integers(-8, 64) | st.sampled_from([2**40, 2**63]), min_size=2, max_size=2),
    }
)


@CASES
@given(st.data())
def test_headers_of_safetensors(tmp_path_factory, data):
    """Lengths, overlaps, shapes, types, claims of a hundred gigabytes."""
    folder = tmp_path_factory.getbasetemp() / "hostile-checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    tensors = data.draw(st.dictionaries(WORD | st.just("__metadata__"), TENSOR | JSON, max_size=3))
    header = json.dumps(tensors).encode()
    claimed = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    body = data.draw(st.binary(max_size=80))
    file = folder / "model.safetensors"
    file.write_bytes(data.draw(st.just(safetensors(header, claimed, body)) | BYTES))
    with a_sentence_at_most(file):
        for tensor in open_checkpoint(folder).tensors.values():
            assert tensor.nbytes <= file.stat().st_size
            assert tensor.read().nbytes == tensor.nbytes


@CASES
@given(st.data())
def test_indices_of_checkpoints(tmp_path_factory, data):
    """No file outside of the directory is opened, whatever the index names."""
    folder = tmp_path_factory.getbasetemp() / "hostile-index"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = st.sampled_from(["../hostile-checkpoint/model.safetensors", "/etc/passwd", "a/../../x", "", "."]) | JSON
    index = data.draw(st.fixed_dictionaries({"weight_map": st.dictionaries(WORD, names, max_size=3) | JSON}) | JSON)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with a_sentence_at_most():
        assert not open_checkpoint(folder).tensors


@pytest.fixture(scope="module")
def config_json(tiny_checkpoint):
    return {family: read_json(tiny_checkpoint(family) / "config.json") for family in ("olmoe", "deepseek_v3")}


@CASES
@given(st.data())
def test_config_json_of_checkpoints(config_json, data):
    values = dict(data.draw(st.sampled_from(sorted(config_json)).map(config_json.__getitem__)))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(values)) | WORD)
        values[key] = data.draw(JSON | st.sampled_from([*FAMILIES, 0, -1, 2**40]))
    with a_sentence_at_most():
        model_config(values, dtype="float32")


@CASES
@given(st.data())
def test_tokenizer_json(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "hostile-tokenizer"
    folder.mkdir(exist_ok=True)
    good = tiny.make_tokenizer().to_str().encode()
    for name, content in (("tokenizer.json", good), ("tokenizer_config.json", b'{"bos_token": "<bos>"}')):
        made = data.draw(mutated(content) | JSON.map(lambda value: json.dumps(value).encode()))
        (folder / name).write_bytes(made)
    with a_sentence_at_most():
        read_tokenizer(folder, data.draw(st.just({}) | st.dictionaries(st.just("eos_token_id"), JSON)))


@CASES
@given(st.data())
def test_captures_of_routing(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "hostile.npz"
    kinds = st.sampled_from([np.int8, np.int64, np.uint16, np.float32, np.bool_, "U3"])
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    ids = np.arange(int(np.prod(shape))).reshape(shape).astype(data.draw(kinds))
    arrays = {"expert_ids": ids} | data.draw(
        st.dictionaries(
            st.sampled_from(["row_lengths", "gate_weights", "other"]),
            st.lists(st.integers(-3, 9) | st.just(2**40), max_size=4).map(np.array),
        )
    )
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    file.write_bytes(data.draw(st.just(buffer.getvalue()) | mutated(buffer.getvalue()) | BYTES))
    with a_sentence_at_most(file):
        read_capture(file, num_experts=4)
    with a_sentence_at_most(file):
        read_arrays(file)


@CASES
@given(st.data())
def test_configurations(tmp_path_factory, data):
    """Values of any kind in any place."""
    folder = tmp_path_factory.getbasetemp()
    changes = data.draw(
        st.dictionaries(st.sampled_from(["model", "target", "unlearning", "evaluation", "study", "attacks"]), JSON)
        | st.dictionaries(
            st.sampled_from(["unlearning", "evaluation", "target"]),
            st.dictionaries(st.sampled_from(["steps", "batch_size", "alpha", "objective", "levels"]), JSON, min_size=1),
            min_size=1,
        )
    )
    with a_sentence_at_most():
        experiment(folder, **changes)


@CASES
@given(st.lists(st.text(max_size=20), max_size=4), BYTES)
def test_command_lines_and_files_of_configurations(tmp_path_factory, words, content):
    file = tmp_path_factory.getbasetemp() / "hostile_config.py"
    file.write_bytes(content)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        assert main(["run", f"--config={file}", "--dry-run", *words]) in (0, 2)
    assert "Traceback" not in said.getvalue()


@CASES
@given(st.data())
def test_files_of_a_run(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "hostile-run"
    folder.mkdir(exist_ok=True)
    content = data.draw(BYTES | JSON.map(lambda value: json.dumps(value).encode()))
    for name in ("made.stage.json", "lines.jsonl"):
        (folder / name).write_bytes(content)
    run_stage("made", folder, "x", "making", lambda: None)
    with a_sentence_at_most():
        read_lines(folder / "lines.jsonl")


SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><!--"


def outline(word):
    """Of a page that shows the word wherever a page shows somebody's words."""
    config = {**CONFIG, "data": {"benchmark": "text", "forget": word}}
    rows = [row("target model", 1.0, kind="reference") | {"note": word}, row("trace", 0.9) | {"note": word}]
    about = {"title": word, "forgotten": word, "conclusion": word, "generated": word, "verdict": word}
    methods = {"trace": method(0, attacks={"prompting": attack((word, 0.5, {}), failed=word)})}
    return Outline(render(results(config=config, rows=rows, methods=methods, environment={word: word}, **about)))


@pytest.fixture(scope="module")
def harmless():
    return outline("word")


@CASES
@given(name=st.just(SCRIPT) | st.text(st.sampled_from("<>&\"'/=ax-! \u202e"), min_size=1, max_size=30))
def test_no_name_or_text_becomes_a_part_of_a_page(harmless, name):
    """The page has the tags and attributes that it has with harmless words."""
    found = outline(name)
    assert (found.tags, found.attributes) == (harmless.tags, harmless.attributes)
