"""The training loop: state, steps, metrics, evaluation."""
