"""Floor 3: one file per hot operation, each with a plain reference; which fast path runs is decided in that file."""
