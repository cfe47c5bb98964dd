"""Floor 4: the transformer as plain PyTorch. No ranks, no environment, no global config."""
