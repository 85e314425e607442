"""Tezzeret: checks blueprints and compiles them into kernels."""
