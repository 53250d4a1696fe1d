"""A measurement survives the way through JSON."""

import json
import math

import pytest

from trace_jax.evaluation.measurement import Measurement, find

ACCURACY = Measurement("forget_accuracy", 0.5, 60, 0.4, 0.6, "test")


@pytest.mark.parametrize(
    "measurement", [ACCURACY, Measurement("privleak", -57.5, 200, -80, -30, "validation", "a note")]
)
def test_json_both_ways(measurement):
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json(), allow_nan=False))) == measurement


def test_an_interval_that_does_not_exist_is_null_in_json():
    plain = Measurement("verbatim", 0.5, 1, math.nan, math.nan, "test").to_json()
    assert plain["low"] is None and plain["high"] is None
    assert math.isnan(Measurement.from_json(plain).low)


def test_what_is_not_a_measurement_is_refused():
    with pytest.raises(ValueError, match="missing"):
        Measurement.from_json({"name": "forget_accuracy"})


def test_find_looks_at_name_and_split():
    assert find([ACCURACY], "forget_accuracy", "test") is ACCURACY
    assert find([ACCURACY], "forget_accuracy", "validation") is None
