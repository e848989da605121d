"""Assembly and execution: a RunConfig becomes a Plan, a Plan becomes processes.

* ``plan``      RunConfig -> Plan: processes, stores, bytes; pure and printable
* ``compose``   the composition root: the only file that names concrete classes, and the builders
* ``local``     runs a plan: in this process, or through ``host``
* ``host``      children on this host: readiness, failures, ordered teardown
* ``roles``     what a child process does (train, capture)
* ``lock``      one run a directory
* ``status``    what a run directory says about its run
"""
