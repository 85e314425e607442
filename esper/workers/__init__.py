"""Workers: processes that do one dangerous job at a time, and the pools that keep them.

Nothing is imported here: the sandbox's keeper starts without site packages and needs two small modules only.
"""
