"""What the outside sees of a run: console, files, pictures, traces. Nothing here changes the training."""
