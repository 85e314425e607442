"""Checkers that ship with Esper: each tells whether something of yours keeps the contract of its kind."""

from esper.blueprints.checks import check_blueprint

__all__ = ["check_blueprint"]
