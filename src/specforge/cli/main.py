"""``specforge``: the verbs, and what becomes of errors.

exit code 0    done
          1    failed for a reason that the user cannot fix
          2    bad input: one sentence on standard error
          130  interrupted: the command that continues, on standard error
"""

from __future__ import annotations

import errno
import logging
import shlex
import sys
from typing import Annotated

import typer

from specforge import __version__
from specforge.cli import (
    capture,
    demo,
    doctor,
    evaluate,
    export,
    plan,
    quarantine,
    regenerate,
    serve_target,
    status,
    train,
)
from specforge.errors import SpecForgeError, UserError

RESUMABLE = ("train", "demo")
REPEATABLE = ("capture", "regenerate")
"""Given again, it goes on where it was."""
FIXABLE = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    }
)
"""What a file system says of a path that the user can change, or of a disk that the user can clear."""

app = typer.Typer(
    name="specforge",
    help="Train draft models for speculative decoding on the hidden states of a live, frozen target.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
demo.register(app)
train.register(app)
plan.register(app)
capture.register(app)
regenerate.register(app)
evaluate.register(app)
export.register(app)
serve_target.register(app)
status.register(app)
quarantine.register(app)
doctor.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the program decides.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a command line (default: this process's) and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(given, prog_name="specforge")
    except UserError as error:
        _leave(f"error: {error}", 2)
    except SpecForgeError as error:
        _leave(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        _leave(f"error: {error.filename or 'a file'}: {error.strerror}", 2)
    except KeyboardInterrupt:
        _leave(_how_to_continue(given), 130)
    except SystemExit as leaving:
        if leaving.code == 130:  # the command-line library turned Ctrl-C into this
            print(_how_to_continue(given), file=sys.stderr)
        raise


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _how_to_continue(arguments: list[str]) -> str:
    if any(verb in arguments for verb in REPEATABLE):
        return f"interrupted; continue with: {shlex.join(['specforge', *arguments])}"
    if not any(verb in arguments for verb in RESUMABLE):
        return "interrupted"
    resumed = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return f"interrupted; continue with: {shlex.join(['specforge', *resumed])}"
