"""WMDP-Cyber: unlearn hazardous knowledge of cybersecurity from a published model.

Command:   hf download Qwen/Qwen1.5-MoE-A2.7B-Chat --local-dir qwen
           python -m trace_jax.main --config configs/wmdp_cyber.py:qwen1.5-moe-a2.7b --workdir runs/cyber \\
             --config.model.path=qwen
           Add --dry-run to check everything that needs neither weights nor data.
Variants:  MODEL or MODEL,METHOD. Models: olmoe-1b-7b, qwen1.5-moe-a2.7b, deepseek-v2-lite, mixtral-8x7b, phi-3.5-moe,
           qwen3-30b-a3b, gpt-oss-20b. Methods: trace (TRACE on GradDiff, the default), graddiff, npo, simnpo, rmu,
           seuf.
           All have the same trained parameters (seuf: its own choice of them), retain loss, alpha, rows and steps, so
           that graddiff is trace without its weights; both at once: --config.methods='["uniform", "trace"]'. None is
           tuned: a study gives each the same grid (docs/evaluation.md). METHOD:published has its authors' settings.
Data:      cais/wmdp-corpora, cyber-forget-corpus: 1,000 texts, column text, split train. Retain: the test split of
           wikitext-2-raw-v1, as RMU's authors do; for text nearer to the forget set, cyber-retain-corpus (4,473 texts):
           --config.data.neighbour=huggingface:cais/wmdp-corpora/cyber-retain-corpus. The hub is read at pinned
           revisions. Built once (docs/data.md), these are read without the hub: tfds:wmdp_corpora/cyber-forget-corpus
           and so on; questions: tfds:wmdp/wmdp-cyber:test, tfds:mmlu/all:test.
Hardware:  the dry run prints the bytes of parameters and optimizer. qwen1.5-moe-a2.7b with trace: 73 GiB and
           activations, so 2 accelerators of 80 GB. Methods that train everything take
           about 20 bytes a parameter.
Time:      not measured. Arithmetic: 8 rows of 768 tokens through 2.7 billion active parameters are about 0.13 PFLOP a
           step, a third of a second at 40 % of an H100's dense bfloat16 rate; 500 steps, so minutes, and evaluations.
Measured:  accuracy on wmdp_cyber and on MMLU in lm-eval's words, zero-shot, at every evaluation (docs/evaluation.md).
           Both have 16 thousand questions; at an estimated 130 tokens each, half a minute by the same arithmetic.
           --config.evaluation.multiple_choice.max_questions=500 takes a part of each, spread evenly.
           Levels, stop and keep rules read the accuracy on half of WMDP's questions (wmdp_half) against that on half of
           MMLU's (mmlu_half, relative to the original): --config.unlearning.stop_forgetting=0.3.
           Relearning as 2502.05374 does it (all parameters train): --config.attacks.relearning='{"steps": [100],
             "schedule": "linear", "warmup_steps": 10}'
           Other tasks of lm-eval, afterwards:
           python -m trace_jax.main lm-eval --workdir runs/cyber --tasks hellaswag,winogrande
Result:    nobody has run this file. Published, WMDP-Cyber accuracy (chance .25) / MMLU (arXiv 2411.18797, table 3; one
           run each, no seeds): Qwen1.5-MoE .419 / .598 before; GradDiff .296 / .297, NPO .345 / .461, RMU .261 / .356;
           with SEUF .245 / .530, .320 / .547, .254 / .535. DeepSeek-V2-Lite .380 / .555 before; GradDiff .290 / .393,
           NPO .320 / .470, RMU .253 / .454; with SEUF .268 / .490, .290 / .479, .286 / .542. Mixtral-8x7B-Instruct
           .520 / .682 before, RMU on bio and cyber .308 / .671 (model card cais/Mixtral-8x7B-Instruct_RMU).
"""

import ml_collections
from published import benchmark_config, rmu

FORGET = "huggingface:cais/wmdp-corpora/cyber-forget-corpus:train"
RETAIN = "huggingface:Salesforce/wikitext/wikitext-2-raw-v1:test"
# RMU's authors cut cyber texts at 768 tokens and retain texts at 512 (github.com/centerforaisafety/wmdp); here a text
# is cut into rows of 768 and read whole. Their shortest text is 0 characters, or 200 for Mixtral; here empty lines and
# headings of wikitext go.
DATA = {"forget": FORGET, "retain": RETAIN, "row_length": 768, "min_length": 50}
QUESTIONS = {
    "wmdp_cyber": "huggingface:cais/wmdp/wmdp-cyber:test",
    "mmlu": "huggingface:cais/mmlu/all:test",
}
LEVELS = (0.35, 0.3)  # of the accuracy; chance is .25
COMMON = {
    "steps": 500,  # github.com/OPTML-Group/Unlearn-Simple, WMDP: at most so many
    "forget_batch_size": 4,
    "retain_batch_size": 4,
    "evaluate_every": 50,
    "checkpoint_every": 100,
}
METHODS = {
    # TRACE's own settings aren't published: GradDiff's rate, and this package's other defaults. Not tuned at this size.
    "trace": {"learning_rate": 5e-6},
    # Zephyr-7B on WMDP-Bio (github.com/OPTML-Group/Unlearn-Simple): rates, beta, 1 x 4 rows. NPO there takes the mean
    # over a text's tokens, not their sum.
    "graddiff": {"learning_rate": 5e-6, "alpha": 1.0},
    "npo": {"learning_rate": 5e-6, "alpha": 1.0, "objective": {"beta": 0.0225, "form": "token_mean"}},
    "simnpo": {"learning_rate": 9.5e-6, "alpha": 1.0, "objective": {"gamma": 1.0, "beta": 0.1, "delta": 0.0}},
    # Zephyr-7B (arXiv 2403.03218 and its notebook): the output of layer 7, counted from 0, and the down projections of
    # layers 5 to 7; 150 batches of 4. Here of all routed experts. Where no c is published for a model, it is five mean
    # lengths of the layer's output on the first batch (arXiv 2408.06223).
    "rmu": {"learning_rate": 5e-5, "alpha": 1200.0, "objective": {"layer": 8}, "steps": 150, "evaluate_every": 15},
    # arXiv 2411.18797, appendix A: one expert of the whole model, anchor 1, 16 rows a step. Its paper sums over experts
    # in the anchor loss, its code takes the mean (--config.unlearning.trainable.anchor_form=mean) and a rate of 2e-4.
    "seuf": {"learning_rate": 1e-4, "alpha": 1.0, "forget_batch_size": 16, "retain_batch_size": 16},
}
# arXiv 2411.18797, appendix A: Qwen1.5-MoE and DeepSeek-V2-Lite on this benchmark. RMU trains all three matrices there.
_SEUF_GRADDIFF = {"learning_rate": 5e-5}
_SEUF_NPO = {"learning_rate": 5e-5, "objective": {"beta": 0.001, "form": "paper"}}
MODELS = {
    ("graddiff", "qwen1.5-moe-a2.7b"): _SEUF_GRADDIFF,
    ("graddiff", "deepseek-v2-lite"): _SEUF_GRADDIFF,
    ("npo", "qwen1.5-moe-a2.7b"): _SEUF_NPO,
    ("npo", "deepseek-v2-lite"): _SEUF_NPO,
    ("rmu", "qwen1.5-moe-a2.7b"): rmu(3000.0, 8),
    ("rmu", "deepseek-v2-lite"): rmu(30000.0, 8),
    # run_rmu_mixtral.ipynb of github.com/centerforaisafety/wmdp, which trains one matrix of one expert per layer.
    ("rmu", "mixtral-8x7b"): rmu(300.0, 8, alpha=1600.0, steps=400, forget_batch_size=2, retain_batch_size=2),
}


def get_config(variant: str = "qwen1.5-moe-a2.7b") -> ml_collections.ConfigDict:
    """One model and one method; `--config.unlearning.NAME=VALUE` changes a number."""
    config = benchmark_config("wmdp_cyber", variant, data=DATA, common=COMMON, methods=METHODS, models=MODELS)
    config.evaluation.multiple_choice = {"sources": QUESTIONS}
    config.evaluation.audit_text = False  # what a model writes after a beginning of these texts is not kept
    config.evaluation.levels = LEVELS
    if variant == "mixtral-8x7b,rmu:published":
        config.data.min_length = 200
    return config
