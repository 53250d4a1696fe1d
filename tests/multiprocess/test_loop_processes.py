"""Two processes, one loop: they stop at the same step, and restore the same one although only one sees damage."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trace_jax.io.files import read_lines

SCRIPT = Path(__file__).with_name("loop_process.py")


@pytest.fixture
def start(pytestconfig):
    """start(directory, pause, ...): both processes; they are ended with the test."""
    started = []

    def run(directory, pause=0.0, *more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}
        pair = [
            subprocess.Popen(
                [sys.executable, SCRIPT, str(port), str(index), directory, str(pause), *more],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        started.extend(pair)
        return pair

    yield run
    for process in started:
        process.kill()


def finish(pair, code):
    """What both printed on stdout and stderr."""
    out = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [code, code], out
    return ["".join(line for line in o.splitlines(True) if line.startswith("RESULT")) for o, _ in out], out


def test_stopped_by_a_notice_to_one_and_damaged_where_one_sees_it_the_run_ends_in_the_same_numbers(start, tmp_path):
    expected, _ = finish(start(tmp_path / "whole"), 0)
    cut = tmp_path / "cut"
    pair, deadline = start(cut, 0.1), time.monotonic() + 120
    while len(read_lines(cut / "metrics.jsonl")) < 12 and time.monotonic() < deadline:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    _, output = finish(pair, 128 + signal.SIGTERM)
    step = read_lines(cut / "metrics.jsonl")[-1]["step"]
    assert 12 <= step < 60
    assert [f"the state after step {step} is saved" in error for _, error in output] == [True, False], "one speaks"

    saved = sorted(int(folder.name) for folder in (cut / "checkpoints").iterdir())
    assert saved[-1] == step and len(saved) == 2
    for file in (cut / "checkpoints" / str(step)).rglob("ocdbt.process_1/d/*"):
        file.write_bytes(b"")
    resumed, output = finish(start(cut), 0)
    assert f"continuing after step {saved[0]} of 60" in output[0][1]
    assert resumed == expected and all(expected)
    assert (cut / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_the_best_state_is_kept_although_on_continuing_one_process_alone_knows_earlier_evaluations(start, tmp_path):
    expected, _ = finish(start(tmp_path / "whole", 0.0, "best"), 0)
    assert all(result.startswith("RESULT step 10\n") for result in expected)
    cut = tmp_path / "cut"
    pair, deadline = start(cut, 0.1, "best"), time.monotonic() + 120
    while len(read_lines(cut / "metrics.jsonl")) < 26 and time.monotonic() < deadline:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    finish(pair, 128 + signal.SIGTERM)
    saved = sorted(int(folder.name) for folder in (cut / "checkpoints").iterdir())
    assert saved[0] == 10 and len(saved) == 3
    resumed, _ = finish(start(cut, 0.0, "best"), 0)
    assert resumed == expected
