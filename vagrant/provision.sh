#!/bin/sh
# Makes a fresh Debian or Ubuntu machine ready for meshnet from the checkout in /vagrant. Run as root; again is fine.
#
#   MESHNET_ROOT=DIR   another checkout
set -eu
root=$(cd "${MESHNET_ROOT:-/vagrant}" && pwd)
target=/opt/meshnet

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
packages='python3 python3-venv iproute2 nftables util-linux curl
    gcc libc6-dev python3-dev' # the last three build the native relay
# shellcheck disable=SC2086 # one word each
apt-get install -y -qq --no-install-recommends $packages

# pip builds in the folder that it is given: in the checkout it would leave files of root, and find its own old ones.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cd "$source"
tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./build --exclude='./*.egg-info' -cf checkout.tar .
mkdir checkout && tar -C checkout --no-same-owner -xf checkout.tar

# Without python-iptables, the extra `legacy`: on Debian it needs the package iptables for libxtables, and that package has
# iptables-legacy, which does the same; and python-iptables 1.2.0 misreads the libxtables of Debian 13. Whoever wants rules in
# the legacy tables installs that package, if the host has it not anyhow.
python3 -m venv "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check -c checkout/scripts/constraints.txt ./checkout
ln -sf "$target/bin/meshnet" "$target/bin/meshnet-init" /usr/local/bin/
meshnet --version
