"""Tolaria: trains the host while it grows: optimizer surgery, evidence, checkpoints, saved models."""
