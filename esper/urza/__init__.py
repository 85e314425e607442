"""Urza: the store of blueprints and kernels, and the ledger of what happened to them."""
