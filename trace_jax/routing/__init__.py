"""TRACE itself, from counts to weights:

statistics.py      how often each expert is used, and by which token (captures.py: as other programs recorded it)
differences.py     how that differs between corpora and models (diagnosis.py: whether by more than noise)
config.py          the settings, and which experts are forget-critical
calibration.py     the multipliers that match their frequencies (solver.py solves), and the weights they give
weights.py         what the unlearning loop consumes, for every weighting (controls.py: the rivals), once or anew
"""
