"""algorithms/peagle."""
