"""Merge weights in, held-out losses and gradients out: where a candidate meets the model (N-world)."""
