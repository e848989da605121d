"""SpecForge trains draft models for speculative decoding on the hidden states of a live, frozen target."""

__version__ = "0.1.0"
