"""Two processes, one loop: they stop at the same step, and restore the same one although only one sees damage."""

import signal
import time
from pathlib import Path

import pytest

from tests.two_processes import launch
from trace_jax.io.files import read_lines

SCRIPT = Path(__file__).with_name("loop_process.py")


@pytest.fixture
def start():
    """start(directory, pause): both processes; they are ended with the test."""
    started = []

    def run(directory, pause=0.0):
        pair = launch(SCRIPT, [(directory, pause)] * 2)
        started.extend(pair)
        return pair

    yield run
    for process in started:
        process.kill()


def finish(pair, code):
    """What both printed as their results, and all that they printed."""
    out = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [code, code], out
    return ["".join(line for line in o.splitlines(True) if line.startswith("RESULT")) for o, _ in out], out


def test_stopped_by_a_notice_to_one_and_damaged_where_one_sees_it_the_run_ends_in_the_same_numbers(start, tmp_path):
    """The best state, after step 10, is kept, although on continuing one process alone knows earlier evaluations."""
    expected, _ = finish(start(tmp_path / "uncut"), 0)
    assert all(result.startswith("RESULT step 10\n") for result in expected)
    cut = tmp_path / "cut"
    pair, deadline = start(cut, 0.1), time.monotonic() + 120
    while len(read_lines(cut / "metrics.jsonl")) < 26 and time.monotonic() < deadline:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    _, output = finish(pair, 128 + signal.SIGTERM)
    saved = sorted(int(folder.name) for folder in (cut / "checkpoints").iterdir())
    best, earlier, step = saved
    assert best == 10 and earlier < step < 60
    assert [f"the state after step {step} is saved" in error for _, error in output] == [True, False], "one speaks"

    for file in (cut / "checkpoints" / str(step)).rglob("ocdbt.process_1/d/*"):
        file.write_bytes(b"")
    resumed, output = finish(start(cut), 0)
    assert f"continuing after step {earlier} of 60" in output[0][1]
    assert resumed == expected
    losses = [
        [(row["step"], row["loss"]) for row in read_lines(path / "metrics.jsonl") if "loss" in row]
        for path in (cut, tmp_path / "uncut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 60
