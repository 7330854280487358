"""The window of checkpoints: the matrix W of shape (k, N) and its products (N-world)."""
