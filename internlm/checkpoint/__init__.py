"""Checkpoints: when they are written, what they hold, how any layout reads them; Hugging Face folders in and out."""
