"""A few of the faults that `python -m tests.faults` plants, so that it goes on working."""

import pytest

from tests.faults import harness, interruptions, space
from tests.faults.__main__ import damages


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return harness.Place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(place):
    """A finished run that nobody disturbed."""
    ended = place.run("short", place.folder / "whole")
    assert ended.code == 0, ended.said
    return place.folder / "whole"


def test_killed_and_left_at_random_moments_a_run_ends_in_the_numbers_of_one_that_was_not(place, whole):
    faults, expected = ["SIGKILL", "terminal", "SIGKILL"], harness.numbers("short", whole)
    tried = interruptions.chains(place, "short", faults, expected, seed=1)
    assert len(tried) == 3 and [one for one in tried if one.problem] == []


def test_a_quota_ends_in_a_sentence_and_the_run_goes_on(place, whole):
    assert space.quota(place, "short", harness.numbers("short", whole), largest=6000).problem == ""


def test_damage_to_a_finished_run_is_refused_and_made_good(place, whole):
    tried = [*damages(place, {"short": whole}, whole, few=True)]
    assert len(tried) >= 15 and [one for one in tried if one.problem] == []
