"""Growth in Weights & Biases: what a run logs at its end, and a report about several."""
