"""`meshnet`: finds the command that was asked for, and shows what went wrong in three lines instead of a traceback."""

import importlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import click
import msgspec

from meshnet import __version__
from meshnet.errors import CommandError, ConfigError
from meshnet_cli.output import harmless_json, output_format, printable

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; a supervisor should not restart on it
EXIT_INTERRUPTED = 130  # 128 + SIGINT


class Entry(NamedTuple):
    """A command that is not imported until it is needed."""

    module: str
    help: str


GROUPS: Mapping[str, Mapping[str, Entry]] = {
    "Start here": {
        "demo": Entry("meshnet_cli.demo", "A small mesh on this machine, to look at and to break."),
        "up": Entry("meshnet_cli.up", "Bring this host into the mesh."),
        "down": Entry("meshnet_cli.down", "Take this host out of the mesh; open connections live on."),
        "status": Entry("meshnet_cli.status", "How the sidecar is: ready or why not."),
        "wait": Entry("meshnet_cli.wait", "Until the sidecar is ready."),
    },
    "See": {
        "conns": Entry("meshnet_cli.conns", "Connections: open now, and recently failed."),
        "explain": Entry("meshnet_cli.explain", "One connection step by step, and what to do about it."),
        "endpoints": Entry("meshnet_cli.endpoints", "Endpoints behind each service: healthy, or why they get nothing."),
        "ping": Entry("meshnet_cli.ping", "Whether a connection would reach a service: captured, let in, how fast."),
        "stat": Entry("meshnet_cli.stat", "Rates and totals of each service."),
        "top": Entry("meshnet_cli.top", "The same, live."),
    },
    "Fix and look": {
        "check": Entry("meshnet_cli.check", "Whether this host can be in the mesh."),
        "bug-report": Entry("meshnet_cli.bug_report", "One file with all that is needed to look into a fault."),
        "rules": Entry("meshnet_cli.rules", "The kernel's redirect rules: plan, show, verify and keep."),
        "log": Entry("meshnet_cli.log", "What the sidecar logs, changed while it runs."),
        "init": Entry("meshnet_cli.init", "Put the redirect rules into the kernel, or take them out."),
    },
    "Kubernetes": {
        "inject": Entry("meshnet_cli.inject", "Put the sidecar into the pods of manifests."),
        "uninject": Entry("meshnet_cli.uninject", "Take it out again."),
        "install": Entry("meshnet_cli.install", "Print what a namespace needs for pods in the mesh."),
    },
    "Admin": {
        "set": Entry("meshnet_cli.set", "Change settings; what is in force is changed with them."),
        "get": Entry("meshnet_cli.get", "The settings, and where each comes from."),
        "drain": Entry("meshnet_cli.drain", "Have the sidecar end when what is open has ended."),
        "proxy": Entry("meshnet_cli.proxy", "Run the sidecar in the foreground."),
        "ca": Entry("meshnet_cli.ca", "The certificate authority: create it, issue identities."),
    },
}
ENTRIES: Mapping[str, Entry] = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class Commands(click.Group):
    """The top level: lists every command without importing one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = ENTRIES.get(cmd_name)
        if entry is None:
            return None
        command = importlib.import_module(entry.module).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in ENTRIES and not name.startswith("-"):
            raise click.exceptions.NoSuchCommand(name, possibilities=ENTRIES, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.help) for name, entry in group.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with expected_errors(ctx):
            return super().invoke(ctx)


@contextmanager
def expected_errors(ctx: click.Context) -> Iterator[None]:
    """Turns what a command may raise on purpose into what click prints and exits with."""
    try:
        yield
    except CommandError as error:
        raise Failure(error.what, error.why, error.fix, error.code, output_format(ctx)) from error
    except ConfigError as error:
        raise Failure(
            error.problem, _place(error), error.suggestion or _mend(error), EXIT_CONFIG, output_format(ctx)
        ) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _place(error: ConfigError) -> str:
    if error.line:
        return f"it is in {error.file}:{error.line}"
    if error.file.startswith("MESHNET_"):
        return f"the variable {error.file} says so"
    return f"it is about {error.file}" if error.file else ""


def _mend(error: ConfigError) -> str:
    """What to type where the error itself has no better suggestion."""
    if not error.file:
        return ""
    if error.line:
        return f"edit {error.file}, line {error.line}"
    return f"unset {error.file}" if error.file.startswith("MESHNET_") else f"ls -ld {shlex.quote(error.file)}"


class FailureView(msgspec.Struct, rename="camel"):
    """What goes to stderr when JSON was asked for."""

    error: str
    why: str
    fix: str
    exit_code: int
    kind: str = "Error"


class Failure(click.ClickException):
    """One line what happened, one line why, one line what to type."""

    def __init__(self, what: str, why: str, fix: str, code: int, output: str) -> None:
        super().__init__(what)
        self.view = FailureView(what, why, fix, code)
        self.exit_code = code  # type: ignore[misc]  # click declares a ClassVar and reads the instance
        self.output = output

    def show(self, file: IO[Any] | None = None) -> None:
        if self.output in {"json", "jsonl"}:
            click.echo(harmless_json(msgspec.json.encode(self.view).decode()), err=True)
            return
        for label, text in (("error", self.view.error), ("why", self.view.why), ("fix", self.view.fix)):
            if text:
                # Indented, so that no line of a text passes for one of ours.
                lines = "\n".join(map(printable, text.split("\n"))).replace("\n", "\n" + " " * len("error: "))
                click.echo(f"{label}: {lines}", err=True)


@click.group(
    cls=Commands,
    name="meshnet",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First steps: `meshnet demo`. On a host: `sudo meshnet up`, then `meshnet conns`.",
)
@click.version_option(__version__, prog_name="meshnet")
def main() -> None:
    """meshnet: a service mesh for TCP that no application has to know about."""


def init_main() -> None:
    """`meshnet-init`, the entry point of an init container: the same as `meshnet init`."""
    main.main(["init", *sys.argv[1:]], prog_name="meshnet")


if __name__ == "__main__":
    main()
