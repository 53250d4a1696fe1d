"""TRACE itself, from counts to weights:

statistics.py      how often each expert is used, and by which token
selection.py       which experts are forget-critical
calibration.py     the multipliers that match their frequencies (entropy_balancing.py solves, certificate.py reports)
weights.py         the weight of a token from its experts
retain_weights.py  what the unlearning loop consumes, for every weighting (controls.py: the rivals)
online.py          weights by the routing of the model that trains
recalibration.py   all of it solved anew for that model, every few steps
diagnostics.py     routing compared: between corpora, and with the original model
"""
