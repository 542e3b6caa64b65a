"""Serving a model: the engines that generate, and the API that clients call."""
