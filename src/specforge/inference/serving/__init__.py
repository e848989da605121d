"""The target behind HTTP: the capture server of ``contracts.capture_server``, with ``HFTargetEngine`` inside.

settings   ServingSettings: order, bounds
jobs       one sample or one prompt to work on, and the queue of them
writers    what becomes of captured features: put into a store, or kept for the answer
sinks      the open stores, by the sink that names them
service    CaptureService: the thread that owns the engine; requests in, tickets out
api        the calls over HTTP
openapi    what ``/openapi.json`` says of them
server     TargetServer: all of it on a socket
"""
