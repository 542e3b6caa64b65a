"""Evaluation: the figures, the functions that compute them, and the runs that produce what is scored."""
