"""Assembly and execution: a RunConfig becomes a Plan, a Plan becomes processes.

* ``plan``      RunConfig -> Plan: processes, stores, bytes; pure and printable
* ``compose``   the composition root: the only file that names concrete classes, and the builders
* ``local``     runs a plan: in this process, or through ``host``
* ``host``      the supervisor: children on this host, their restarts, ordered teardown
* ``restarts``  when a child that died is started again
* ``child``     one child process and its two pipes; ``parent`` is the child's side of them
* ``endpoint``  the listening socket and the token, which outlive the process that serves
* ``roles``     what a child process does (train, capture)
* ``lock``      one run a directory
* ``status``    what a run directory says about its run
"""
