"""Workers: processes that do one dangerous job at a time, and the pools that keep them."""
