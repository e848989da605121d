"""The ledger: ``base`` (protocol, states), ``noop``, ``memory``, ``sql`` with its ``schema``."""
