"""Tamiyo: watches a training run and decides, at its boundaries, what to grow and what to keep."""
