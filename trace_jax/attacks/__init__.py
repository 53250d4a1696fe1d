"""Attacks on an unlearned model: what it gives back has not been unlearned."""
