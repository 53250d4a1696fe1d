"""Unlearn your own text from a Mixture-of-Experts checkpoint of Hugging Face, and get a checkpoint back.

Command:   hf download allenai/OLMoE-1B-7B-0924 --local-dir olmoe
           python -m trace_jax.main --config configs/huggingface.py --workdir runs/mine \\
             --config.model.path=olmoe --config.data.forget=forget.jsonl --config.data.retain=retain.jsonl
Hardware:  one accelerator with 80 GB for a model of 7 billion parameters in bfloat16 (2 bytes each). Trained ones (the
           down projections of all experts; 2.1 billion there) takes 18 bytes more each: weight, Adam's moments and
           gradient in float32, and the rounded weight. Temporary copies of expert weights in the matmul come on
           top; they haven't been measured on an accelerator. Disk is checked before the run begins.
Result:    runs/mine/report.html (forgetting against utility along the way, with intervals) and runs/mine/export, which
           transformers loads, with the files that the original has. The path is tested on tiny checkpoints of two
           families; no run of this size has been measured yet, so tune alpha and the learning rate on your data.
Attacks:   --config.attacks.quantization={} and others (docs/evaluation.md); with queries of your own,
           --config.attacks.prompting.paraphrases=queries.jsonl
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """TRACE on rows. The forget loss stops pushing a row at 6 nats per token, so that a run can't blow up.

    Routers, attention and embeddings stay as they are: an unlearner that may move routers hides knowledge by sending
    its tokens elsewhere. 1e-5 is the rate of most published unlearning runs at this size.
    """
    config = ml_collections.ConfigDict()
    config.name = "huggingface"
    config.methods = ("trace_rows",)
    config.export = "trace_rows"
    config.model = {"path": ""}
    config.data = {"benchmark": "text", "row_length": 512}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
        "trainable": "down_projections",
        "learning_rate": 1e-5,
        "warmup_steps": 20,
        "steps": 300,
        "forget_batch_size": 4,
        "retain_batch_size": 8,
        "evaluate_every": 30,
        "checkpoint_every": 100,
    }
    # Gradients of `max_gradients` texts a side are the dearest of the membership attacks: 0 leaves them out.
    config.evaluation = {"batch_size": 8, "max_members": 200, "max_gradients": 32, "levels": (0.5,)}
    return config
