"""The notebook of the diagnosis, as a stranger runs it."""


def test_it_runs_and_says_the_verdict(printed):
    said = printed("is_there_anything_to_calibrate")
    assert "mismatch present: " in said
