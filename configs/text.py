"""Unlearn your own text: a small MoE is trained on it, then forgets one part.

Command:   python -m trace_jax.main --config configs/text.py --workdir runs/mine \\
             --config.data.forget=forget.jsonl --config.data.retain=retain.jsonl
           (JSONL with "text", or "question" and "answer"; a .txt file; or a directory of them; see docs/data.md)
Hardware:  2 CPU cores, 4 GB of memory for a few megabytes of text.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's model and methods on the files given on the command line."""
    config = ml_collections.ConfigDict()
    config.name = "text"
    config.methods = ("uniform", "trace_rows")
    config.data = {"benchmark": "text", "allow_overlap": False}
    config.unlearning = {"objective": {"name": "gradient_difference", "nll_ceiling": 6.0}}
    return config
