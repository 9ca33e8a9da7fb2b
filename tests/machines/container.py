"""What the lines of init/Containerfile do, tried without a tool that builds images.

Each stage is a tree over the machines' image of the same Debian, whose Python stands for that of the official image.
apt and pip find what they ask for as they do in a machine.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.machines import image
from tests.machines.machine import Failed

_FOLDER = image.CACHE / "run/container"
_BACKENDS = ("nft", "iptables", "legacy")

# $1 image, $2 folder, $3 wheels. In namespaces of its own, so that nothing of it is left, and no network is reached.
_STAGES = f"""
set -eu
image=$1 folder=$2 wheels=$3
mount --make-rprivate /
stage() {{
    root=$folder/$1
    mkdir -p "$root" "$root.upper" "$root.work"
    mount -t overlay overlay -o "lowerdir=$image,upperdir=$root.upper,workdir=$root.work" "$root"
    mkdir -p "$root{image.WHEELS}"
    mount --bind "$wheels" "$root{image.WHEELS}"
    mount -t proc proc "$root/proc"
    mount --bind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/run"
    inside / 'apt-get install -y -qq python3-venv python3-dev && ln -s /usr/bin/python3 /usr/local/bin/python'
}}
inside() {{
    chroot ${{3:-}} "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \\
        DEBIAN_FRONTEND=noninteractive sh -euc "cd $1; $2"
}}
copy() {{ # a folder's contents, or files into a folder
    mkdir -p "$2"
    if [ -d "$1" ]; then cp -a "$1/." "$2/"; else cp "$1" "$2/"; fi
}}
"""


def build(checkout: bytes) -> None:
    """From a tar archive of the checkout. Raises Failed with the last of what it printed."""
    tree, wheels = image.build(suite()), image.wheels(suite())
    shutil.rmtree(_FOLDER, ignore_errors=True)
    context = _FOLDER / "checkout"
    context.mkdir(parents=True)
    subprocess.run(["tar", "-C", context, "-xf", "-"], input=checkout, check=True)
    script = "\n".join([_STAGES, *_stages(context), *_programs()])
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script, "build", tree, _FOLDER, wheels],
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(_FOLDER)
    said = done.stdout + done.stderr
    missing = [backend for backend in _BACKENDS if f"in force ({backend})" not in said]
    if done.returncode or missing:
        raise Failed(f"init/Containerfile: exit code {done.returncode}, no rules by {missing}\n{said[-3000:]}")


def _lines() -> list[tuple[str, str]]:
    """Instructions and what they are told."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (image.ROOT / "init/Containerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def suite() -> str:
    """Of Debian, that it is made from."""
    (base,) = {told.split()[0] for word, told in _lines() if word == "FROM"}
    return base.rpartition("-")[2]


def _stages(context: Path) -> Iterator[str]:
    where = "/"
    for word, told in _lines():
        match word:
            case "FROM":
                where = "/"
                yield f"stage {told.split()[2] if ' AS ' in told else 'final'}"
            case "WORKDIR":
                where = told
                yield f'mkdir -p "$root{told}"'
            case "RUN":
                yield f"inside {where} {shlex.quote(told)}"
            case "COPY":
                *sources, to = told.split()
                base = str(context)
                if sources[0].startswith("--from="):
                    base = f"$folder/{sources.pop(0).removeprefix('--from=')}"
                to = to if to.startswith("/") else f"{where}/{to}"
                yield from (f'copy "{base}/{source}" "$root{to}"' for source in sources)


def _programs() -> Iterator[str]:
    """As the two containers of a pod begin: one as the image's user, the other as root."""
    told = dict(_lines())  # of those that stand there once
    environment = f"export {told['ENV']}"
    yield f"inside / {shlex.quote(f'{environment}; meshnet proxy --help')} --userspec={told['USER']}"
    for backend in _BACKENDS:
        yield f"inside / {shlex.quote(f'{environment}; meshnet-init --backend {backend} && meshnet-init remove')}"
