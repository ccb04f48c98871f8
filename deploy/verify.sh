#!/bin/sh
# Is this kit what was made: every file unharmed, none missing, none added, and signed by whom?
#
#   sh verify.sh                    # the sums alone: against accidents, not against intent
#   sh verify.sh site.pub           # and their signature, by a public key that came another way
#
# Needs sha256sum, and openssl for a signature. Status: 0 all is well.
set -eu
cd "$(dirname "$0")"

if [ $# -gt 0 ]; then
    case $1 in /*) key=$1 ;; *) key=${OLDPWD:-.}/$1 ;; esac
    if [ ! -f SHA256SUMS.sig ]; then
        echo "error: this kit is not signed: there is no SHA256SUMS.sig" >&2
        exit 1
    fi
    if ! openssl dgst -sha256 -verify "$key" -signature SHA256SUMS.sig SHA256SUMS >&2; then
        echo "error: SHA256SUMS was not signed with the key of $1; do not install this kit" >&2
        exit 1
    fi
elif [ -f SHA256SUMS.sig ]; then
    echo "note: this kit is signed; to know by whom: sh verify.sh PUBLIC_KEY.pem" >&2
fi

if ! sha256sum --check --strict --quiet SHA256SUMS >&2; then
    echo "error: files differ from SHA256SUMS; copy the kit anew" >&2
    exit 1
fi
# Links count too: they may lead out of the kit.
added=$(find . ! -type d ! -path ./SHA256SUMS ! -path ./SHA256SUMS.sig |
    awk 'NR == FNR { known[substr($0, 67)]; next } !(substr($0, 3) in known)' SHA256SUMS -)
if [ -n "$added" ]; then
    echo "error: not in SHA256SUMS, so nobody vouches for it:" >&2
    echo "$added" >&2
    exit 1
fi
echo "verified: $(wc -l <SHA256SUMS) files" >&2
