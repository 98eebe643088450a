"""The commands. Each is thin: it checks, calls the library, and prints results to stdout, progress to stderr.

Nothing heavy is imported here, so that `--help` answers at once; every command imports what it needs.
"""

from __future__ import annotations

import click

from secateur.cli.bench import bench
from secateur.cli.compare import compare
from secateur.cli.convert import convert
from secateur.cli.demo import demo
from secateur.cli.distill import distill
from secateur.cli.evaluate import evaluate
from secateur.cli.export import export
from secateur.cli.finetune import finetune
from secateur.cli.info import info
from secateur.cli.joint_train import joint_train
from secateur.cli.meta_train import meta_train
from secateur.cli.prune import prune
from secateur.cli.quiet import quiet, verbose_option
from secateur.cli.report import report
from secateur.cli.reproduce import reproduce
from secateur.cli.score import score
from secateur.cli.verify import verify
from secateur.errors import SecateurError
from secateur.support.versions import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="secateur")
@verbose_option
def cli() -> None:
    """Remove attention heads that a task does not need from a pre-trained Transformer, and prove the result."""


_NOTHING = "nothing half-written is left"
_LONGEST = 900  # characters of an error
_FROM_MODEL_TO_SMALLER = (info, score, prune, verify)
_BESIDE_IT = (
    bench,
    distill,
    finetune,
    evaluate,
    meta_train,
    joint_train,
    compare,
    reproduce,
    report,
    export,
    convert,
    demo,
)
for command in (*_FROM_MODEL_TO_SMALLER, *_BESIDE_IT):
    cli.add_command(verbose_option(command))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 with one line on stderr for bad input, 130 for Ctrl-C."""
    try:
        with quiet():
            code, message = _run(arguments)
    except KeyboardInterrupt:  # at its very end
        code, message = 130, f"secateur: stopped; {_NOTHING}"
    if message:  # the last line: what the exception held on to, such as a progress bar, has been closed by now
        click.echo(message, err=True)
    return code


def _run(arguments: list[str] | None) -> tuple[int, str]:
    """Return the exit code, and the line that explains it."""
    try:
        result = cli.main(arguments, prog_name="secateur", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code, ""
    except click.exceptions.NoArgsIsHelpError as error:
        return 2, error.format_message()
    except click.ClickException as error:
        return 2, _error(error.format_message())
    except (click.Abort, KeyboardInterrupt) as stop:
        hint = str(stop.__cause__ or stop)  # click raises its Abort from the exception that holds it
        return 130, f"secateur: stopped; {hint or _NOTHING}"
    except (SecateurError, OSError) as error:
        return 2, _error(str(error))
    except (RuntimeError, MemoryError) as error:
        from secateur.texts.halving import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return 2, _error(
            f"out of memory; smaller batches, shorter texts or fewer runs at once take less ({str(error)[:100]})"
        )
    return (result if isinstance(result, int) else 0), ""


def _error(message: str) -> str:
    line = " ".join(message.split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."  # click shows values whole
    # What a file or a name holds must not steer the terminal.
    return "secateur: error: " + "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
