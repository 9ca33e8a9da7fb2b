"""`meshnet install`: what the pods of one namespace need beside themselves, as a manifest."""

from datetime import UTC, datetime
from pathlib import Path

import click

from meshnet.codec.mesh import read_mesh
from meshnet.codec.settings import load_settings
from meshnet.errors import CommandError, ConfigError
from meshnet.model.identity import spiffe_id, trust_domain
from meshnet.model.settings import IdentitySection
from meshnet_cli.inject import NAME
from meshnet_cli.kubernetes import resources
from meshnet_cli.kubernetes.manifests import Form, Object, write_documents

_SETTINGS = "meshnet.toml"
_IDENTITY_FILES = tuple(Path(path).name for path in (IdentitySection().certificate, IdentitySection().key,
                                                     IdentitySection().bundle))  # fmt: skip
_PATH = click.Path(path_type=Path)


class _Identity(click.ParamType[tuple[str, Path]]):
    name = "identity"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        account, equals, folder = str(value).partition("=")
        if not equals or not folder:
            self.fail(f"{value!r} is not ACCOUNT=DIR, such as web=./web-identity", param, ctx)
        return str(NAME.convert(account, param, ctx)), Path(folder)


@click.command(
    "install",
    short_help="Print what a namespace of Kubernetes needs for pods in the mesh.",
    epilog="\b\nExample:\n  meshnet ca issue --namespace shop --service web --out web-identity\n"
    "  meshnet install --namespace shop --mesh mesh.d --identity web=web-identity | kubectl apply -f -",
)
@click.option("--namespace", type=NAME, default="default", show_default=True, help="Where the pods are.")
@click.option("--create-namespace", is_flag=True, help="Print the Namespace, too.")
@click.option(
    "--mesh", "mesh", type=_PATH, multiple=True, metavar="FILE|DIR", help="Mesh resources; of a folder, its *.yaml."
)
@click.option("--config", type=_PATH, metavar="FILE", help="A meshnet.toml, for every sidecar.")
@click.option(
    "--identity", "identities", type=_Identity(), multiple=True, metavar="ACCOUNT=DIR",
    help="The identity of a service account, as `meshnet ca issue` wrote it.",
)  # fmt: skip
@click.option("--config-map", type=NAME, default="meshnet", show_default=True, help="Its name.")
@click.option(
    "-o", "--output", "form", type=click.Choice(("yaml", "json")), default="yaml", show_default=True,
    help="How to print the manifest.",
)  # fmt: skip
def command(
    *,
    namespace: str,
    create_namespace: bool,
    mesh: tuple[Path, ...],
    config: Path | None,
    identities: tuple[tuple[str, Path], ...],
    config_map: str,
    form: Form,
) -> None:
    """Print a ConfigMap with settings and mesh resources, and a Secret for each identity; nothing is sent anywhere.

    All of it is checked as a sidecar would. The pods themselves are for `meshnet inject`. Applied again with other mesh
    resources, running sidecars take them up within about a minute; settings, when their pod starts.
    """
    documents: list[Object] = [resources.namespace(namespace)] if create_namespace else []
    documents.append(resources.config_map(config_map, namespace, _files(mesh, config)))
    for account, folder in identities:
        documents.append(resources.identity_secret(account, namespace, _identity(folder, namespace, account)))
    click.echo(write_documents(documents, form), nl=False)


def _files(mesh: tuple[Path, ...], config: Path | None) -> dict[str, str]:
    """What goes into the ConfigMap, by name. Raises ConfigError."""
    found: dict[str, Path] = {}
    for path in (each for given in mesh for each in _resource_files(given)):
        if path.name in found:
            raise ConfigError(f"two files are called {path.name}: {found[path.name]} is the other", file=str(path),
                              suggestion="rename one: in a ConfigMap there are no folders")  # fmt: skip
        found[path.name] = path
    texts = {name: _text(path) for name, path in sorted(found.items())}
    read_mesh([(str(found[name]), text) for name, text in texts.items()], 1)
    settings = "" if config is None else _text(config)
    load_settings(settings, {}, str(config))
    texts = {_SETTINGS: settings} | texts
    size = sum(len(name) + len(text.encode()) for name, text in texts.items())
    if size > resources.MOST_BYTES:
        raise CommandError(
            f"{size} bytes do not fit into a ConfigMap",
            why=f"Kubernetes takes {resources.MOST_BYTES} at most",
            fix="leave out what the pods of this namespace never call",
        )
    return texts


def _resource_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [each for each in sorted(path.iterdir()) if each.suffix in (".yaml", ".yml") and each.name[0] not in ".#"]
    if not found:
        raise ConfigError("there is no *.yaml in it", file=str(path), suggestion="name another folder: --mesh DIR")
    return found


def _text(path: Path) -> str:
    try:
        return _content(path).decode()
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", file=str(path), suggestion="save the file as UTF-8") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from None


def _identity(folder: Path, namespace: str, account: str) -> dict[str, bytes]:
    """The files of `folder`. Raises ConfigError, also when the certificate is somebody else's."""
    from meshnet.control import authority

    files = {name: _content(folder / name) for name in _IDENTITY_FILES}
    certificate = folder / authority.CERTIFICATE
    try:
        names = authority.describe(files[authority.CERTIFICATE], now=datetime.now(UTC))[0].names
    except ValueError:
        raise ConfigError("there is no certificate in it", file=str(certificate)) from None
    wanted = {spiffe_id(trust_domain(name), namespace, account) for name in names}
    if not wanted & set(names):
        again = f"meshnet ca issue --namespace {namespace} --service {account} --out {folder}"
        raise ConfigError(
            f"the certificate is that of {', '.join(names)}, not of the service account {account} in {namespace}",
            file=str(certificate),
            suggestion=again,
        )
    return files
