#!/bin/sh
# Install this kit on a machine without a network. Needs Python (see kit.json) with its module venv.
#
#   sh install.sh                                   # into /opt/dermaflux
#   sh install.sh --to DIR --python python3.11 --public-key site.pub
#   sh install.sh --systemd                         # and a service of systemd, not yet started
#   sh install.sh --to DIR --back                   # the release before this one is current again
#
# Each kit gets a folder of its own under DIR/releases, and DIR/current leads to the one in use; so
# what runs is not touched, and going back is one command. Nothing is asked of any network.
set -eu
umask 022
kit=$(cd "$(dirname "$0")" && pwd)
to=/opt/dermaflux
python=
public=
systemd=
back=

fail() {
    echo "error: $*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
    --to | --python | --public-key)
        [ $# -gt 1 ] || fail "$1 needs a value"
        case $1 in
        --to) to=$2 ;;
        --python) python=$2 ;;
        --public-key) public=$2 ;;
        esac
        shift
        ;;
    --systemd) systemd=yes ;;
    --back) back=yes ;;
    *) fail "$1 is not known; use --to DIR, --python PYTHON, --public-key FILE, --systemd, --back" ;;
    esac
    shift
done

# A link is replaced in one step: whoever starts meanwhile gets the old one or the new one, whole.
lead() {
    ln -sfn "$1" "$to/.$2.new"
    mv -T "$to/.$2.new" "$to/$2"
}

if [ -n "$back" ]; then
    [ -L "$to/previous" ] || fail "$to has no release before the current one"
    was=$(readlink "$to/current")
    lead "$(readlink "$to/previous")" current
    lead "$was" previous
    echo "$to/current is $(readlink "$to/current") again; start the service anew" >&2
    exit 0
fi

if [ -n "$public" ]; then sh "$kit/verify.sh" "$(realpath "$public")"; else sh "$kit/verify.sh"; fi

# One field of kit.json, which stands alone on its line.
told() {
    sed -n "s/^ \"$1\": \"\\(.*\\)\",*\$/\\1/p" "$kit/kit.json"
}
wanted=$(told python)
: "${python:=python$wanted}"
found=$("$python" -c 'import platform as p, sys
print("%d.%d" % sys.version_info[:2], (p.system() + " " + p.machine()).lower())' 2>/dev/null) ||
    fail "there is no $python; install Python $wanted with its module venv, or name it: --python"
[ "$found" = "$wanted $(told machine)" ] ||
    fail "this kit is for Python $wanted on $(told machine); here is $found"

# From here on it is asked for from other folders, too.
mkdir -p "$to" 2>/dev/null && [ -w "$to" ] ||
    fail "$to takes no files; run this as a user who may write there, or name another: --to DIR"
to=$(cd "$to" && pwd)
release=$(told version)-$(told bundle)
place=$to/releases/$release
if [ ! -f "$place/.complete" ]; then
    rm -rf "$place"
    mkdir -p "$place"
    "$python" -m venv "$place/venv" ||
        fail "$python cannot make an environment; on Debian install python$wanted-venv"
    # By hash, from the kit alone, nothing compiled. The variables keep a site's pip.conf out.
    PIP_CONFIG_FILE=/dev/null "$place/venv/bin/python" -m pip install --quiet --no-index \
        --find-links "$kit/wheels" --no-deps --require-hashes --only-binary :all: \
        --no-cache-dir --disable-pip-version-check -r "$kit/requirements.txt"
    "$place/venv/bin/python" -m pip check >&2
    cp -R "$kit/bento" "$kit/bundle" "$kit/NOTICE" "$kit/LICENSE" "$kit/kit.json" \
        "$kit/deploy/probe.py" "$place/"
    touch "$place/.complete"
fi

# Does it fit here? Its findings are told; what is wrong with the bundle itself stops this.
(
    cd "$place/bento/src"
    PYTHONDONTWRITEBYTECODE=1 "$place/venv/bin/python" -m dermaflux doctor "$place/bundle" >&2
) || fail "the doctor found what has to be mended first; nothing was changed in $to/current"
(
    cd "$place/bento/src"
    PYTHONDONTWRITEBYTECODE=1 "$place/venv/bin/python" -m serving.doctor "$place/bundle" --quick >&2
) || echo "note: mend what failed above before the service is started" >&2

if [ -L "$to/current" ] && [ "$(readlink "$to/current")" != "releases/$release" ]; then
    lead "$(readlink "$to/current")" previous
fi
lead "releases/$release" current

if [ -n "$systemd" ]; then
    [ "$to" = /opt/dermaflux ] || fail "dermaflux.service runs /opt/dermaflux; edit it for $to"
    install -m 644 "$kit/deploy/systemd/dermaflux.service" /etc/systemd/system/
    install -m 644 "$kit/deploy/systemd/dermaflux.sysusers" /usr/lib/sysusers.d/dermaflux.conf
    systemd-sysusers
    install -d -m 750 -g dermaflux /etc/dermaflux
    [ -f /etc/dermaflux/environment ] ||
        install -m 640 -g dermaflux "$kit/deploy/systemd/environment" /etc/dermaflux/
    systemctl daemon-reload
    echo "installed; look into /etc/dermaflux/environment, then: systemctl enable --now dermaflux" >&2
fi
echo "$to/current is $release. To serve on this machine alone:
  DERMAFLUX_BUNDLE='$to/current/bundle' BENTOML_DO_NOT_TRACK=true \\
      '$to/current/venv/bin/python' -m bentoml serve '$to/current/bento' --host 127.0.0.1" >&2
printf '{"release": "%s", "place": "%s"}\n' "$release" "$place"
