"""algorithms/domino."""
