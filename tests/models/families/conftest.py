"""Keeps what the tests measured of each family, for docs/models.md (`scripts/models_table.py`)."""

import functools
import json
from pathlib import Path

import pytest

from trace_jax.checkpoints.pretrained import load_pretrained


@pytest.fixture
def record_family(request):
    """record_family(model_type, measurements): writes them where --record-families says, if it does."""

    def record(model_type, measurements):
        directory = request.config.getoption("--record-families")
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            Path(directory, f"{model_type}.json").write_text(json.dumps(measurements, indent=2) + "\n")

    return record


@pytest.fixture(scope="session")
def imported(tiny_checkpoint):
    """imported(model_type): its tiny checkpoint as our model, read once."""
    return functools.cache(lambda model_type: load_pretrained(tiny_checkpoint(model_type)))
