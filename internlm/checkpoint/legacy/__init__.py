"""Checkpoints of the 2023 framework: reading, resuming from and writing them."""
