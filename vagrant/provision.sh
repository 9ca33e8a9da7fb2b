#!/bin/sh
# Makes a fresh Debian or Ubuntu machine ready for meshnet from the checkout in /vagrant. Run as root; again is fine.
set -eu
root=${MESHNET_ROOT:-/vagrant}
target=/opt/meshnet

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends python3 python3-venv iproute2 nftables util-linux curl

python3 -m venv "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/scripts/constraints.txt" "$root"
ln -sf "$target/bin/meshnet" "$target/bin/meshnet-init" /usr/local/bin/
meshnet --version
