"""algorithms/medusa."""
