"""`meshnet inject` and `meshnet uninject`: manifests with the sidecar in every pod, and without it."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from meshnet.errors import ConfigError
from meshnet_cli.kubernetes.manifests import Form, read_documents, write_documents
from meshnet_cli.kubernetes.wishes import IMAGE, SETTINGS, Wishes, is_name
from meshnet_cli.kubernetes.workloads import Told, What
from meshnet_cli.kubernetes.workloads import inject as inject_documents
from meshnet_cli.kubernetes.workloads import uninject as uninject_documents
from meshnet_cli.output import Parsed, printable, warn

_Transform = Callable[[list[object], str], tuple[list[object], list[Told]]]


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"{text!r} is not the name of an object of Kubernetes")
    return text


NAME = Parsed("name", _name)


def _manifest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    files = click.option(
        "-f", "--file", "files", metavar="FILE", multiple=True, help="A manifest; - is standard input, and the default."
    )
    form = click.option(
        "-o", "--output", "form", type=click.Choice(("yaml", "json")), default="yaml", show_default=True,
        help="How to print the manifests.",
    )  # fmt: skip
    diff = click.option("--diff", is_flag=True, help="Print a unified diff of what is changed instead.")
    return files(form(diff(command)))


@click.command(
    "inject",
    short_help="Put the sidecar into the pods of Kubernetes manifests.",
    epilog="\b\nExamples:\n  meshnet inject -f deploy.yaml | kubectl apply -f -\n"
    "  meshnet inject -f deploy.yaml --diff\n  helm template ./chart | meshnet inject | kubectl apply -f -\n"
    "  kubectl get deploy web -o yaml | meshnet inject --image registry.example/meshnet:1 | kubectl apply -f -",
)
@_manifest_options
@click.option("--image", default=IMAGE, show_default=True, metavar="IMAGE", help="What init/Containerfile built.")
@click.option("--config-map", type=NAME, metavar="NAME", help="With settings and mesh resources.  [default: meshnet]")
@click.option(
    "--identity-secret", type=NAME, metavar="NAME",
    help="With certificate, key and bundle.  [default: meshnet-identity- and the service account]",
)  # fmt: skip
@click.option(
    "--native-sidecar/--no-native-sidecar", default=True, show_default=True,
    help="Native ones need Kubernetes 1.29; an ordinary one holds the application back by a hook.",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(("auto", "nft", "iptables", "legacy")),
    help="What writes the rules; legacy takes the right NET_RAW.  [default: auto]",
)  # fmt: skip
def command(
    *,
    files: tuple[str, ...],
    form: Form,
    diff: bool,
    image: str,
    config_map: str | None,
    identity_secret: str | None,
    native_sidecar: bool,
    backend: str | None,
) -> None:
    """Print manifests with the sidecar in every pod; nothing is sent anywhere.

    Pods, Deployments, StatefulSets, DaemonSets, ReplicaSets, ReplicationControllers, Jobs and CronJobs get it, all else
    passes as it is. A second run changes nothing. Annotations of the pod's template (meshnet.dev/...) beat the flags;
    the label meshnet.dev/inject: disabled leaves a workload out.
    """
    wishes = Wishes(
        image=image,
        native_sidecar=native_sidecar,
        config_map=config_map or Wishes().config_map,
        identity_secret=identity_secret or "",
        settings={SETTINGS["backend"]: backend} if backend else {},
    )
    _print(files, form, diff, lambda documents, file: inject_documents(documents, wishes, file))


@click.command(
    "uninject",
    short_help="Take the sidecar out of the pods of Kubernetes manifests.",
    epilog="\b\nExample:\n  kubectl get deploy web -o yaml | meshnet uninject | kubectl apply -f -",
)
@_manifest_options
def uninject_command(*, files: tuple[str, ...], form: Form, diff: bool) -> None:
    """Print manifests as they were before `meshnet inject`: containers, volumes, probes and annotations."""
    _print(files, form, diff, uninject_documents)


def _print(files: tuple[str, ...], form: Form, diff: bool, transform: _Transform) -> None:
    """Everything, or an error and nothing. What was done with each workload goes to standard error."""
    texts: list[str] = []
    told: list[Told] = []
    for file in files or ("-",):
        name = "standard input" if file == "-" else file
        documents = read_documents(_read(file, name), name)
        changed, about = transform(documents, name)
        told += about
        texts.append(_diff(documents, changed, form, name) if diff else write_documents(changed, form))
    if all(each.what == "unknown" for each in told):
        warn("there is no workload in it")
    for each in told:
        click.echo(printable(f"{each.name}: {_SAID[each.what]}"), err=True)
    click.echo(("" if diff or form == "json" else "---\n").join(text for text in texts if text), nl=False)


_SAID: dict[What, str] = {
    "injected": "injected",
    "uninjected": "taken out",
    "unchanged": "nothing to change",
    "disabled": "left out, as its label meshnet.dev/inject says",
    "unknown": "left as it is, out of the mesh: not a kind and version that is looked into (meshnet inject --help)",
}


def _read(file: str, name: str) -> str:
    """Raises ConfigError."""
    try:
        return sys.stdin.buffer.read().decode() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", file=name, suggestion="save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=name) from None


def _diff(before: list[object], after: list[object], form: Form, name: str) -> str:
    """Of both as we print them, so that comments and quotes that get lost are not shown."""
    old, new = (write_documents(each, form).splitlines(keepends=True) for each in (before, after))
    return "".join(difflib.unified_diff(old, new, fromfile=name, tofile=f"{name} (changed)"))
