"""How fast the code is, as ratios of what was measured in turns on one machine."""
