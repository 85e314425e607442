"""Urabrask: tries kernels out, measures them, and says which may be used."""
