"""algorithms/dspark."""
