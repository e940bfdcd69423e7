"""Wrong systems that the gate or the proof must catch, by name."""
