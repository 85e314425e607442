"""Karn: knows which blueprints would serve."""
