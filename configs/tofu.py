"""TOFU: unlearn a tenth of 200 fictitious authors from a model that has learnt all of them.

Command:   python -m trace_jax.main --config configs/tofu.py:qwen1.5-moe-a2.7b --workdir runs/tofu \\
             --config.model.path=DIR --config.model.retrained=RETRAINED
           Add --dry-run to check everything that needs neither weights nor data.
Target:    DIR must be a checkpoint of the model that was trained on locuslab/TOFU, config full, first: no published
           model knows authors that were made up. TOFU's recipe: learning rate 1e-5, weight decay 0.01, one epoch of
           warm-up, 5 epochs of 32 pairs a step; any trainer that writes safetensors will do. The form of a pair is
           "Question: ...\\nAnswer: ...", as this package writes it, with the end token after it. RETRAINED is the same
           on retain90 alone (optional): without it there is no forget quality, which compares with its truth ratios.
Variants:  MODEL or MODEL,METHOD. Models: olmoe-1b-7b, qwen1.5-moe-a2.7b, deepseek-v2-lite, mixtral-8x7b, phi-3.5-moe,
           qwen3-30b-a3b, gpt-oss-20b. Methods: trace (TRACE on GradDiff, the default), graddiff, npo, simnpo, rmu,
           seuf.
           All have the same trained parameters (seuf: its own choice of them), retain loss, alpha, rows and steps, so
           that graddiff is trace without its weights; both at once: --config.methods='["uniform", "trace"]'. None is
           tuned: a study gives each the same grid (docs/evaluation.md). METHOD:published has its authors' settings.
Data:      locuslab/TOFU, configs forget10 (400 pairs) and retain90 (3,600 pairs), columns question and answer, split
           train. Evaluation reads the configs forget10_perturbed, retain_perturbed (400 questions each),
           real_authors_perturbed (100) and world_facts_perturbed (117). Another forget set takes all three of:
             --config.data.forget=huggingface:locuslab/TOFU/forget05:train
             --config.data.retain=huggingface:locuslab/TOFU/retain95:train --config.evaluation.tofu.forget=forget05
           and forget01 with retain99 likewise. The hub is read at a pinned revision. Built once (docs/data.md), it is
           read without the hub: tfds:tofu/forget10:train, tfds:tofu/retain90:train, evaluation.tofu.data tfds:tofu.
Hardware:  the dry run prints the bytes of parameters and optimizer. qwen1.5-moe-a2.7b with trace: 73 GiB and
           activations, so 2 accelerators of 80 GB. Methods that train everything take
           about 20 bytes a parameter.
Time:      not measured. Arithmetic: 32 rows of 256 tokens through 2.7 billion active parameters are about 0.17 PFLOP a
           step, 0.4 seconds at 40 % of an H100's dense bfloat16 rate; 10 epochs of about 12 steps, so a minute, and
           evaluations, which take longer: 1,017 answers are written each time, in 64 batches of 16; of about 100
           tokens each, at 10 to 20 ms, one to two minutes. --config.evaluation.tofu.max_questions=100 takes a part.
Measured:  tofu_forget_quality, tofu_model_utility and what they are made of (docs/evaluation.md), every other epoch.
           Levels, stop and keep rules read the statistic of forget quality's test on half of the forget questions
           (tofu_forget_ks_half; 0: as the retrained model) against model utility on half of the other questions,
           relative to the original; without RETRAINED the probability of the forget answers against retain answers.
           A checkpoint that is already there is measured alone, without unlearning:
           python -m trace_jax.main evaluate --config configs/tofu.py --checkpoint DIR --retrained RETRAINED \\
             --output out
Result:    nobody has run this file, and no result on a Mixture of Experts is known to us (the authors of SEUF, arXiv
           2411.18797, left TOFU out because it needs training first).
"""

import ml_collections
from published import benchmark_config

BENCHMARK = "huggingface:locuslab/TOFU"
# Only answers carry loss. A row holds the pairs that fit it, two or three; NPO and SimNPO take each as a sample of its
# own, as their authors do.
DATA = {
    "forget": f"{BENCHMARK}/forget10:train",
    "retain": f"{BENCHMARK}/retain90:train",
    "row_length": 256,
}
# open-unlearning (github.com/locuslab/open-unlearning, arXiv 2506.12618): 32 pairs a step, 10 epochs of 12.5 steps, one
# of them warm-up, linear decay, weight decay 0.01. 16 rows hold about 32 pairs or more.
COMMON = {
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "warmup_steps": 12,
    "schedule": "linear",
    "epochs": 10.0,
    "forget_batch_size": 16,
    "retain_batch_size": 16,
    "evaluate_every": 25,
    "checkpoint_every": 50,
}
METHODS = {
    # TRACE's own settings aren't published: the others' rate, and this package's defaults. Not tuned at this size.
    "trace": {},
    "graddiff": {"alpha": 1.0},
    "npo": {"alpha": 1.0, "objective": {"beta": 0.1}},
    # open-unlearning's; github.com/OPTML-Group/Unlearn-Simple has beta 2.5 and gamma 0.1375.
    "simnpo": {"alpha": 1.0, "objective": {"beta": 4.5, "delta": 0.0, "gamma": 0.125}},
    # open-unlearning's RMU has c 2 and alpha 1 on dense models; here layer (7, counted from 0) and alpha of arXiv
    # 2403.03218, and the length of the target as in arXiv 2408.06223.
    "rmu": {"learning_rate": 5e-5, "alpha": 1200.0, "objective": {"layer": 8}},
    # Not published for this benchmark: what arXiv 2411.18797, appendix A, has for WMDP-Cyber. Its paper sums over the
    # experts in the anchor loss, its code takes the mean (--config.unlearning.trainable.anchor_form=mean) and a rate
    # of 2e-4.
    "seuf": {
        "learning_rate": 1e-4,
        "alpha": 1.0,
        "forget_batch_size": 16,
        "retain_batch_size": 16,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "schedule": "constant",
    },
}


def get_config(variant: str = "qwen1.5-moe-a2.7b") -> ml_collections.ConfigDict:
    """One model and one method; `--config.unlearning.NAME=VALUE` changes a number."""
    config = benchmark_config("tofu", variant, data=DATA, common=COMMON, methods=METHODS)
    config.evaluation.tofu = {"data": BENCHMARK, "forget": "forget10"}
    config.evaluation.batch_size = 16
    # Of the statistic; between two times 200 questions p is .04 at .14. Without a retrained model: .3 and .15 of the
    # original's probability.
    config.evaluation.levels = (0.3, 0.15)
    return config
