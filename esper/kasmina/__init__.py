"""Kasmina: wraps a host model so that chosen layers carry seeds, and grafts children into them."""
