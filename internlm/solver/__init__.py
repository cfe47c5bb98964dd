"""Floor 5: Hybrid ZeRO, the optimizer engine, and the schedules of its learning rate."""
