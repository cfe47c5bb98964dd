"""Floor 5: what is done to a model from outside, before it has memory."""
