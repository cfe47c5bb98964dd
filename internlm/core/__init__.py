"""Floor 2: ranks: from a launcher to a process group, who stands where, what they send, and seeds."""
