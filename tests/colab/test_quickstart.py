"""The notebook that a stranger opens first."""


def test_it_runs_and_says_what_was_reached_and_what_the_models_say(printed):
    said = printed("quickstart")
    assert "Run(" in said and "trace_rows" in said and "Calibration(closes " in said
