"""Scores by sample id."""
