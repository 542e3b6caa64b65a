"""What judges a model: the figures, what they are computed from, and the runs that produce them."""
