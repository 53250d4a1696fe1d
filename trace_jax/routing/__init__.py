"""TRACE itself, from counts to weights:

statistics.py      how often each expert is used, and by which token; how routing differs between corpora and models
config.py          the settings, and which experts are forget-critical
calibration.py     the multipliers that match their frequencies (entropy_balancing.py solves), and the weights they give
weights.py         what the unlearning loop consumes, for every weighting (controls.py: the rivals), once or anew
"""
