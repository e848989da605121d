"""The ledger: ``base`` (protocol, states), ``noop``, ``memory``, and ``sql`` over ``sqlite`` or ``postgres``."""
