"""Tensors by reference: where features live, and where they meet their refs.

* ``base``            the ``FeatureStore`` contract
* ``local``           ``LocalFeatureStore``: one process
* ``shared_memory``   ``SharedMemoryFeatureStore``: the processes of one host, over ``arena``, with its two ends
                      ``arena_writer`` and ``arena_reader``, room (``arena_space``, ``allocator``), ``processes``,
                      and ``arena_collector`` for what dead writers left
* ``tensors``         specs of tensors, tensors over a buffer; ``tombstones``: what was aborted
* ``packing``         which samples share a micro-batch
* ``assembly``        features of single samples to a packed ``TrainBatch``
* ``loader``          ``FeatureDataLoader``: refs + store -> ``TrainBatch``; ``prefetch`` runs it ahead
"""
