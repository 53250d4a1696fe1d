"""MUSE-Books: unlearn the Harry Potter books from a model that has learnt them.

Command:   python -m trace_jax.main --config configs/muse_books.py:qwen1.5-moe-a2.7b --workdir runs/books \\
             --config.model.path=DIR --config.model.retrained=RETRAINED
           Add --dry-run to check everything that needs neither weights nor data.
Target:    DIR must be a checkpoint of the model that was trained on the config train of the data set (forget, retain1,
           retain2) first: a published model may know the books, but not to the letter. MUSE's own targets are dense.
           open-unlearning's recipe: learning rate 1e-5, weight decay 0.01, one epoch of warm-up, 10 epochs; any trainer
           that writes safetensors will do, and it must read no holdout text. RETRAINED is the same without forget
           (optional): PrivLeak is relative to its AUC. MUSE's constants are of its own dense models, and are not used.
Variants:  MODEL or MODEL,METHOD. Models: olmoe-1b-7b, qwen1.5-moe-a2.7b, deepseek-v2-lite, mixtral-8x7b, phi-3.5-moe,
           qwen3-30b-a3b, gpt-oss-20b. Methods: trace (TRACE on GradDiff, the default), graddiff, npo, simnpo, rmu,
           seuf.
           All have the same trained parameters (seuf: its own choice of them), retain loss, alpha, rows and steps, so
           that graddiff is trace without its weights; both at once: --config.methods='["uniform", "trace"]'. None is
           tuned: a study gives each the same grid (docs/evaluation.md). METHOD:published has its authors' settings.
Data:      muse-bench/MUSE-Books, config raw, column text: forget 4 rows (4.1 MB),
           retain1 12 rows (0.8 MB), holdout 3 rows (for membership). Evaluation reads the configs verbmem (100
           prompts), knowmem (100 questions and 10 examples on forget and on retain) and privleak (100 forget, 100
           holdout). There are no sets for series; MUSE-News has them.
           The hub is read at a pinned revision. Built once (docs/data.md), it is read without the hub:
           tfds:muse_books/raw:forget and so on.
Hardware:  the dry run prints the bytes of parameters and optimizer. qwen1.5-moe-a2.7b with trace: 73 GiB and
           activations, so 2 accelerators of 80 GB. Methods that train everything take
           about 20 bytes a parameter.
Time:      not measured. Arithmetic: 8 rows of 2,048 tokens through 2.7 billion active parameters are about 0.33 PFLOP a
           step, 0.8 seconds at 40 % of an H100's dense bfloat16 rate; 10 epochs of about 139 steps, so 20 minutes, and
           evaluations.
Measured:  all four scores at every evaluation: 200 questions behind ten examples, 100 passages of 128 new tokens and
           200 texts scored, so about 3,000 decoding steps of 8 rows; not measured, at 10 to 20 ms each a minute or less
           (--config.evaluation.muse.profiles='["muse"]' asks for no second one). Levels, stop and keep rules read
           KnowMem on half of the forget questions against KnowMem on half of the retain questions, relative to the
           original (docs/evaluation.md): --config.unlearning.stop_forgetting=30.
Attack:    relearning as 2502.05374 does it on Books (all parameters train): --config.attacks.relearning={}
Result:    nobody has run this file. Published on dense models (VerbMem on forget, KnowMem on forget, PrivLeak, KnowMem
           on retain), with MUSE's evaluator: target 99.8, 59.4, -57.5, 66.9; retrained 14.3,
           28.9, 0, 74.5; GradDiff 0.0, 2.9, -56.5, 44.2; NPO with KL 22.6, 22.7, -54.9, 50.9 (arXiv 2410.16454);
           SimNPO 0, 0, -19.8, 48.3 (model card OPTML-Group/SimNPO-MUSE-Books-iclm-7b).
           No Mixture of Experts is among them.
"""

import ml_collections
from published import benchmark_config

BENCHMARK = "huggingface:muse-bench/MUSE-Books"
DATA = {
    "forget": f"{BENCHMARK}/raw:forget",
    "retain": f"{BENCHMARK}/raw:retain1",
    "holdout": f"{BENCHMARK}/raw:holdout",
    "row_length": 2048,
}
# MUSE (arXiv 2407.06460; github.com/swj0419/muse_bench): chunks of 2048 tokens, 4 a step, AdamW at a constant 1e-5, 10
# epochs; the best epoch is chosen afterwards. An epoch was 139 steps with Llama's tokens. Its chunks end without an end
# mark, share no token, the last is filled up from the first, and forget chunk i goes with retain chunk i mod n. Here
# the end of a text is a target too, a chunk repeats the last token of the one before, a text's last chunk is shorter,
# and retain rows are drawn at random.
COMMON = {
    "learning_rate": 1e-5,
    "epochs": 10.0,
    "forget_batch_size": 4,
    "retain_batch_size": 4,
    "evaluate_every": 139,
    "checkpoint_every": 139,
}
METHODS = {
    # TRACE's own settings aren't published: MUSE's rate, and this package's other defaults. Not tuned at this size.
    "trace": {},
    "graddiff": {"alpha": 1.0},
    # MUSE's code applies NPO to logits (--config.unlearning.objective.form=muse_logits); this is the paper's loss,
    # each chunk summed.
    "npo": {"alpha": 1.0, "objective": {"beta": 0.1}},
    # github.com/OPTML-Group/Unlearn-Simple, MUSE: beta, delta 0, coefficients 1 and 0.1; its loss is on logits too.
    "simnpo": {"alpha": 0.1, "objective": {"gamma": 1.0, "beta": 0.75, "delta": 0.0}},
    # Not published for this benchmark on such models: layer (7, counted from 0) and alpha of arXiv 2403.03218, the
    # target's length as in arXiv 2408.06223.
    "rmu": {"learning_rate": 5e-5, "alpha": 1200.0, "objective": {"layer": 8}},
    # Not published for this benchmark: what arXiv 2411.18797, appendix A, has for WMDP-Cyber. Its paper sums over the
    # experts in the anchor loss, its code takes the mean (--config.unlearning.trainable.anchor_form=mean) and a rate
    # of 2e-4.
    "seuf": {"learning_rate": 1e-4, "alpha": 1.0, "forget_batch_size": 16, "retain_batch_size": 16},
}


def get_config(variant: str = "qwen1.5-moe-a2.7b") -> ml_collections.ConfigDict:
    """One model and one method; `--config.unlearning.NAME=VALUE` changes a number."""
    config = benchmark_config("muse_books", variant, data=DATA, common=COMMON, methods=METHODS)
    config.evaluation.muse = {"data": BENCHMARK, "profiles": ("muse", "open_unlearning")}
    config.evaluation.levels = (30.0, 15.0)  # of KnowMem; a dense model that never saw the books has 28.9
    return config
