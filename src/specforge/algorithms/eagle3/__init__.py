"""algorithms/eagle3."""
