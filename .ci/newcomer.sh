#!/usr/bin/env bash
# The README's first two commands in a fresh clone of the current commit.
#
#     .ci/newcomer.sh                with python3 from PATH
#     sudo .ci/newcomer.sh TREE      in the root of another distribution, which has python3, its venv and git
#
# A tree is made by, for example: mmdebstrap --include=python3,python3-venv,git,ca-certificates bookworm TREE
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
tree="${1:-}"
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME # variables of this shell, which a newcomer does not have

typed="$(awk '/^## Start/ { there = 1 } there && /^```$/ { exit } there && block { print } there && /^```sh$/ { block = 1 }' \
    "$repository/README.md" | head -n 2)"
[ "$(wc -l <<< "$typed")" -eq 2 ] || { echo "newcomer: the README must have two commands below '## Start'" >&2; exit 1; }

if [ -n "$tree" ]; then
    [ -x "$tree/usr/bin/python3" ] || { echo "newcomer: $tree has no /usr/bin/python3" >&2; exit 1; }
    home="$(mktemp -d "$tree/tmp/newcomer.XXXXXX")"
else
    home="$(mktemp -d)"
fi
trap 'rm -rf "$home"' EXIT
git clone --quiet "$repository" "$home/cifar-exp"

script="set -e; cd '${home#"$tree"}/cifar-exp'; python3 --version
$typed"
if [ -z "$tree" ]; then
    sh -c "$script"
else # a private mount namespace; name server and certificates are this machine's
    # shellcheck disable=SC2016
    unshare --mount bash -euo pipefail -c '
        tree="$1"
        for what in proc sys dev; do mkdir -p "$tree/$what"; mount --rbind "/$what" "$tree/$what"; done
        for file in /etc/resolv.conf ${SSL_CERT_FILE:+"$SSL_CERT_FILE"}; do
            mkdir -p "$tree$(dirname "$file")"
            [ -e "$tree$file" ] || touch "$tree$file"
            mount --bind "$(readlink -f "$file")" "$tree$file"
        done
        HOME=/tmp PATH=/usr/sbin:/usr/bin:/sbin:/bin exec chroot "$tree" /bin/sh -c "$2"
    ' - "$tree" "$script"
fi
accuracy="$(cat "$home"/cifar-exp/outputs/*/*/metrics.jsonl | sed -n 's/.*"test\/accuracy": \([0-9.]*\).*/\1/p' | tail -n 1)"
echo "newcomer: test accuracy $accuracy"
awk -v accuracy="$accuracy" 'BEGIN { exit !(accuracy > 0.9) }'
