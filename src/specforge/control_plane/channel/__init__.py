"""The streaming channel: ``base`` (both ends), ``memory``, ``file``, and the ``queue`` that the loader reads."""
