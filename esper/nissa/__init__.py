"""Nissa, the observer: turns what happened in a run into pictures, tables, logs and one honest sentence."""
