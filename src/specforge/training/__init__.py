"""The trainer: batches in, a trained draft out. It sees no store, no channel and no topology."""
