"""Quantised checkpoints that several tests read."""

import pytest


@pytest.fixture(scope="session", params=["fp8", "mxfp4"])
def packed_and_plain(request, tmp_path_factory):
    """Directories of a quantised checkpoint and of the same decoded: DeepSeek-V3's way, or GPT-OSS's."""
    from quantised_checkpoints import twins

    return twins(request.param, tmp_path_factory.mktemp(request.param))
