"""Use of trained models: text out of a checkpoint."""
