"""Evaluation: the figures, the functions that compute them, and the runs that produce the answers."""
