"""Urza: the store of blueprints and kernels, and the ledger of what happened to them."""

from esper.urza.door import VerifiedKernel
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

__all__ = ["KeyRing", "Urza", "VerifiedKernel"]
