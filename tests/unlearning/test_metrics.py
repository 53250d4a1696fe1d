"""What each item gave is kept by step: an interrupted run leaves the file of an uninterrupted one."""

import numpy as np

from trace_jax.unlearning.metrics import Metrics, read_items


def items(step):
    return {"test/forget/correct": np.array([True, step > 3, False]), "test/general/nll": np.float32([step, 2.5])}


def write(path, steps, identity="a"):
    metrics = Metrics(path, identity)
    for step in steps:
        metrics.write_items(step, items(step))
    return metrics


def same(path, steps, identity="a"):
    found, arrays = read_items(path, identity)
    assert found.tolist() == steps
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, np.stack([items(step)[name] for step in steps]))
        assert values.dtype == items(0)[name].dtype


def test_a_step_that_is_evaluated_again_replaces_itself_and_later_ones(tmp_path):
    write(tmp_path, [0, 3, 6, 9])
    write(tmp_path, [6])
    same(tmp_path, [0, 3, 6])
    assert not list(tmp_path.glob(".*"))


def test_continuing_drops_what_comes_after_the_state_and_starting_anew_drops_all(tmp_path):
    metrics = write(tmp_path, [0, 3, 6])
    metrics.trim(4)
    same(tmp_path, [0, 3])
    metrics.trim(0)
    assert read_items(tmp_path) is None


def test_items_of_another_run_are_not_continued(tmp_path):
    write(tmp_path, [0, 3])
    assert read_items(tmp_path, "b") is None
    write(tmp_path, [0], identity="b")
    same(tmp_path, [0], identity="b")
    assert read_items(tmp_path, "a") is None
