"""The notebook of a published checkpoint, on a tiny one of the same family."""

import importlib.util
import re


def test_a_checkpoint_is_planned_unlearned_exported_and_read_by_transformers_alike(printed):
    said = printed("unlearn_a_checkpoint")
    assert "tiny-granite, 2 of 8 experts of each layer train: fits" in said
    if importlib.util.find_spec("torch") is None:  # the notebook says that transformers needs it
        assert "PyTorch is not installed here" in said
        return
    difference, largest = map(float, re.search(r"logits: (\S+) of (\S+)", said).groups())
    assert difference < 1e-4 < 1e-2 < largest
    assert "at 100.0% of the positions" in said
