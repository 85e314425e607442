"""`esper bench speed`: what seeds, kernels and decisions cost on this machine, beside targets and bare limits."""
