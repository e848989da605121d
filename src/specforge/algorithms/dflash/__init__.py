"""algorithms/dflash."""
