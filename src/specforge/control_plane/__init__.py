"""Who may do what with which sample. Metadata only: nothing below imports a tensor library.

* ``base``          what capture and train see: CaptureControl, TrainControl, Lease
* ``controller``    DataFlowController: owns the life of every sample; ``window`` is what it keeps in memory
* ``prompts``       SampleOrder: which sample is trained in which slot
* ``backpressure``  the credits of a capture, a pure policy
* ``metadata``      the ledger: a protocol and its stores
* ``channel``       dispatched refs on their way to the trainer: writer, reader, queues
* ``server``, ``client``, ``wire``  the controller on the network
* ``modes``         which of these a deployment gets
"""
