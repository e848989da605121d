"""algorithms/mtp."""
