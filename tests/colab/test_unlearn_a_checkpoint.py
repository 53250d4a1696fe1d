"""The notebook of a published checkpoint, on a tiny one of the same family."""

import re


def test_a_checkpoint_is_planned_unlearned_exported_and_read_by_transformers_alike(printed):
    said = printed("unlearn_a_checkpoint")
    assert "tiny-granite, 2 of 8 experts of each layer train: fits" in said
    difference, largest = map(float, re.search(r"logits: (\S+) of (\S+)", said).groups())
    assert difference < 1e-4 < 1e-2 < largest
    assert "at 100.0% of the positions" in said
