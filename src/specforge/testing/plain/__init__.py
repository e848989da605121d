"""The obvious form of every algorithm's training step: whole logits, dense masks, plain autograd.

For tests, which compare with it, and benchmarks, which measure against it.
"""
