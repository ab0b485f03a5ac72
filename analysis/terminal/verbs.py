"""How the command line behaves as a whole: global flags anywhere, one line for an error, usage that is explained."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup

from actcache.errors import PipelineError
from actcache.interrupts import interrupt, leave, on_interrupt
from actcache.text import visible
from analysis.terminal.checks import Makes, Takes, explain_missing, find_unquoted
from analysis.terminal.flags import with_flags
from analysis.terminal.screen import emit, options, prepare_screen, show_error, show_line

GLOBAL_FLAGS = ("--json", "--quiet", "-q", "--traceback", "--version")
UsageError: Any = typer.BadParameter.__mro__[1]  # typer has its own copy of click's, or uses click's


class Verbs(TyperGroup):
    """Turns our errors into one line, says how to go on after an interrupt, and takes the global flags anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        prepare_screen()
        own = args[: args.index("--")] if "--" in args else args
        first = [arg for arg in own if arg in GLOBAL_FLAGS]
        with escaped_usage(ctx):
            if unquoted := find_unquoted(own):
                raise UsageError(unquoted, ctx=ctx)
            return super().parse_args(ctx, [*first, *(arg for arg in own if arg not in first), *args[len(own) :]])

    def invoke(self, ctx: Any) -> Any:
        from actcache.artifacts import check_threads, describe_refusal

        try:
            with on_interrupt(interrupt), escaped_usage(ctx):
                check_threads()
                return super().invoke(ctx)
        except PipelineError as error:
            if options.traceback:
                raise
            show_error(error)
            raise typer.Exit(1) from error
        except (OSError, MemoryError, RuntimeError, ImportError) as error:
            refusal = describe_refusal(error)
            if refusal is None or options.traceback:
                raise
            show_error(refusal)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            show_line("interrupted; the same command resumes")
            raise typer.Exit(130) from error


class Program(typer.Typer):
    """The whole program, which Ctrl-C ends quietly before a verb begins and after it has ended."""

    def __init__(self, name: str, help: str) -> None:
        super().__init__(
            name=name, help=help, cls=Verbs, no_args_is_help=True, invoke_without_command=True, add_completion=False,
            rich_markup_mode="rich", pretty_exceptions_enable=False,
        )  # fmt: skip
        self.callback()(take_global_flags)

    def verb(self, panel: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Make a function a verb of the command line, in a panel of the help and with an example."""

        def register(function: Callable[..., None]) -> Callable[..., None]:
            name, epilog = function.__name__.strip("_"), f"Example: {self.info.name} {example}"  # import_ is `import`
            self.command(name, cls=Verb, rich_help_panel=panel, epilog=epilog)(with_flags(function))
            return function

        return register

    def __call__(self, *args: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, leave)  # it stays: what follows this call is the end of the process
        return super().__call__(*args, **options)


def take_global_flags(
    context: typer.Context,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show no progress and no hints.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
    traceback: Annotated[bool, Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
) -> None:
    options.quiet, options.json, options.traceback = quiet, as_json, traceback
    if version:
        emit({"version": program_version()}, f"patchsae {program_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


class Verb(TyperCommand):
    """A verb that says which of its arguments is missing, judged by what is at the paths that were given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            parameter = getattr(error, "param", None)
            if type(error).__name__ != "MissingParameter" or getattr(parameter, "param_type_name", "") != "argument":
                raise
            values, _, _ = self.make_parser(ctx).parse_args(args=given)
            arguments = [each for each in self.params if each.param_type_name == "argument"]
            flat: list[str] = []
            for each in arguments:
                value = values.get(each.name)
                flat += [] if value is None else [value] if isinstance(value, str) else [text for text in value if text]
            roles = [(visible(each.metavar or each.name), self._kind(each.name)) for each in arguments if each.required]
            raise UsageError(
                explain_missing(roles, [text for text in flat if isinstance(text, str)]), ctx=ctx
            ) from error

    def _kind(self, name: str) -> str | None:
        checks = getattr(self.callback, "checks", {}).get(name, [])
        kinds = [check.kind for _, check in checks if isinstance(check, Takes | Makes)]
        return kinds[0] if kinds else "images" if name == "images" else None


@contextmanager
def escaped_usage(ctx: Any) -> Iterator[None]:
    """Escape what a usage error quotes."""
    try:
        yield
    except UsageError as error:
        raise UsageError(visible(error.format_message()), ctx=error.ctx or ctx) from error


def program_version() -> str:
    """The installed version, or in a checkout that is not installed, that of pyproject.toml."""
    try:
        return version("patchsae")
    except PackageNotFoundError:
        import tomllib

        project = Path(__file__).parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"])
