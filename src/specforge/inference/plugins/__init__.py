"""What runs inside other engines: imports ``contracts`` and ``data_plane``, and each engine in one file."""
