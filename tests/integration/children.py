"""Child processes of a test with a pipe to each."""

import contextlib
import multiprocessing


@contextlib.contextmanager
def child_process(target, *arguments, preload):
    """``target(pipe, *arguments)`` in a process of its own: (process, our end of the pipe). Killed at the end.

    Children are forked from a server that has imported ``preload`` and runs no thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join()
        ours.close()
