"""Oona: the message bus."""
