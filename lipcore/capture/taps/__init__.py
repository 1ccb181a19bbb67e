"""Chosen modules: per-sample numbers from the gradients at their outputs."""
