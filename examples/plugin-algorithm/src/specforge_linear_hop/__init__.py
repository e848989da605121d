"""The linear-hop draft algorithm."""
