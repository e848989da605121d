"""Live capture servers as this side sees them: one contract, a dialect each for what they speak."""
