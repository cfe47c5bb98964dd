"""Floor 1: what a run is. Config files become one frozen `Config`; nothing here imports torch."""
