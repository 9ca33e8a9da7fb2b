#!/bin/sh
# All that meshnet could leave on a machine, as lines that are the same when nothing was left: files with rights and
# contents, users, groups, units, rules, links, namespaces, routes, settings of the kernel.
folders=
for folder in /etc /root /usr/local /usr/lib/systemd /usr/lib/sysusers.d /var/lib/meshnet /var/log/meshnet \
    /run/meshnet /run/systemd/system /run/systemd/transient; do
    [ ! -e "$folder" ] || folders="$folders $folder"
done
# The backups of passwd and its like are those of the last change; nobody's leftovers. Drafts and locks beside them are
# those of a groupadd that was killed, which knows a stale lock when it sees one.
drafts='/etc/\(passwd\|shadow\|group\|gshadow\|subuid\|subgid\)\.\(lock\|[0-9]+\)'
# shellcheck disable=SC2086 # one word each
find $folders \( -name '*-' -o -name .pwd.lock -o -name 'run-*' -o -regex "$drafts" \) -prune \
    -o -printf '%y %p %m %u:%g %l\n' | sort | sed 's/^/path /'
# shellcheck disable=SC2086 # one word each
find $folders -type f ! -name '*-' ! -name 'run-*' ! -regex "$drafts" -print0 | sort -z | xargs -0 sha256sum |
    sed 's/^/content /'
ls -d /run/meshnet* /var/lib/meshnet* /var/lib/*/meshnet* /tmp/*meshnet* 2>/dev/null | sed 's/^/exists /'
getent passwd | sort | sed 's/^/user /'
getent group | sort | sed 's/^/group /'
systemctl list-unit-files --no-legend --plain | grep -v ^run- | sed 's/^/unit file /'
systemctl list-units --all --no-legend --plain 'meshnet*' | sed 's/^/unit /'
nft -s list ruleset | sed 's/^/rule /'
# Tables that are empty are no leftovers: who only looks at one makes it.
for family in iptables ip6tables; do
    command -v "$family-legacy-save" >/dev/null || continue
    "$family-legacy-save" | sed 's/ \[[0-9:]*\]$//' |
        awk -v family="$family" '/^\*/ { table = $1 } /^-A / || /^:/ && !/ ACCEPT$/ { print "rule", family, table, $0 }'
done
# Without indices and addresses, which are others after a reboot.
ip -br link | awk '{ sub(/@.*/, "", $1); print "link", $1, $NF }'
ip netns list | sed 's/^/namespace /'
ip rule | sed 's/^/route rule /'
ip -6 rule | sed 's/^/route rule /'
ip route show table all | sed 's/^/route /'
ip -6 route show table all | grep -v fe80 | sed 's/^/route /'
sysctl -a 2>/dev/null | grep -E 'route_localnet|rp_filter|fwmark|ip_forward|src_valid_mark' | sed 's/^/sysctl /'
pgrep -fa meshnet_cli | sed 's/^/process /'
exit 0
