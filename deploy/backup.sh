#!/bin/sh
# Copy what cannot be made again, while the service runs: the audit log, and the folder of marks.
#
#   sh deploy/backup.sh /var/lib/dermaflux /backup/2026-01-31
#
# The first folder holds audit/ and marks/, or one of them. Of the log the head goes first: an older
# head fits a longer log, a newer one would tell of lines that are not in the copy. The key of the log,
# API keys and TLS are secrets of yours and lie elsewhere: see docs/hospital/backup.md.
set -eu
umask 077
if [ $# -ne 2 ] || [ ! -d "$1" ]; then
    echo "error: use: backup.sh FOLDER_OF_RECORDS NEW_FOLDER" >&2
    exit 2
fi
from=$1
to=${2%/}
if [ -e "$to" ]; then
    echo "error: $to is there already; name a new folder" >&2
    exit 2
fi
if [ ! -d "$from/audit" ] && [ ! -d "$from/marks" ]; then
    echo "error: $from has neither audit/ nor marks/" >&2
    exit 2
fi
part=$to.part
rm -rf "$part"
mkdir -p "$part"
if [ -d "$from/audit" ]; then
    mkdir "$part/audit"
    [ ! -f "$from/audit/head.json" ] || cp -p "$from/audit/head.json" "$part/audit/"
    for file in "$from"/audit/*; do
        case $file in */head.json | */lock | */\*) continue ;; esac
        # The service may be in the middle of a line; a moment later it is at another one's end.
        for _ in 1 2 3 4 5; do
            cp -p "$file" "$part/audit/"
            [ -n "$(tail -c 1 "$part/audit/${file##*/}")" ] || break
        done
    done
fi
[ ! -d "$from/marks" ] || cp -Rp "$from/marks" "$part/"
sync
mv "$part" "$to"
echo "copied to $to. Look whether it holds: python -m serving.audit verify $to/audit --key KEY" >&2
