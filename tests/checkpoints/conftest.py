"""Quantised checkpoints that several tests read."""

import pytest


@pytest.fixture(scope="session", params=["fp8", "mxfp4"])
def packed_and_plain(request, tmp_path_factory):
    """Directories of a quantised checkpoint and of the same decoded: DeepSeek-V3's way, or GPT-OSS's."""
    import quantised_checkpoints as quantised
    import tiny_checkpoints

    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "fp8":
        model_type, sizes = "deepseek_v3", {"moe_intermediate_size": 32, "num_hidden_layers": 3}
        settings, quantise = quantised.FP8, quantised.as_fp8
    else:
        model_type, sizes = "gpt_oss", {"hidden_size": 64, "intermediate_size": 32}
        settings, quantise = quantised.MXFP4, quantised.as_mxfp4
    model = tiny_checkpoints.build(model_type, **sizes)
    source = tiny_checkpoints.save(model, model_type, directory / "source")
    return quantised.twins(source, directory, settings, quantise)
