#!/bin/sh
# Installs Mindstream on a device that runs systemd: an environment of its own under /opt/mindstream, a user, folders,
# a configuration, units. Run again it upgrades, while the node runs. docs/devices.md tells more.
set -eu
# Services of another user read what is installed here.
umask 022

usage() {
    cat <<'TEXT'
usage: install.sh [install|upgrade] [options]    install, or upgrade what is installed
       install.sh uninstall [--purge]            remove it; data and configuration stay, unless --purge
       install.sh wheelhouse DIR [--extras NAMES] [--also PACKAGES]
                                                 put all it needs into DIR, to install from it without network

  --wheelhouse DIR    take every package from DIR and nothing from the network (default: this script's own folder, if
                      a mindstream wheel lies there)
  --extras NAMES      extras of pyproject.toml, such as model (default: those installed before, else none)
  --also PACKAGES     more packages to install, such as 'torch onnxruntime-gpu' from NVIDIA's index on a Jetson
  --python PROGRAM    the interpreter, Python 3.10 to 3.13 (default: the first that is found)
  --node NAME         name of this node, for a configuration that is not there yet (default: the machine's name)
  --broker URL        its broker, likewise (default: mqtt://127.0.0.1:1883, a Mosquitto on this machine)
  --ready-timeout S   how long a service may take until it says READY; an upgrade then goes back (default: 120)
  --root DIR          a trial below DIR: no user is made, nothing is started (an image: run this in a chroot instead)
  --no-systemctl      neither enable nor start anything
  --systemctl PROGRAM in place of systemctl
TEXT
}

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'next: %s\n' "$2" >&2; exit 1; }

action=install wheelhouse='' extras='' also='' extras_given=no python='' node='' broker='mqtt://127.0.0.1:1883'
ready_timeout=120 root='' systemctl=systemctl purge=no
case "${1-}" in
install | upgrade | uninstall) action=$1; shift ;;
wheelhouse) action=$1; wheelhouse=${2-}; [ -n "$wheelhouse" ] || die 'wheelhouse needs a folder'; shift 2 ;;
esac
value() { [ $# -ge 2 ] || die "$1 needs a value"; printf '%s' "$2"; }
while [ $# -gt 0 ]; do
    case $1 in
    --wheelhouse) wheelhouse=$(value "$@"); shift 2 ;;
    --extras) extras=$(value "$@"); extras_given=yes; shift 2 ;;
    --also) also=$(value "$@"); extras_given=yes; shift 2 ;;
    --python) python=$(value "$@"); shift 2 ;;
    --node) node=$(value "$@"); shift 2 ;;
    --broker) broker=$(value "$@"); shift 2 ;;
    --ready-timeout) ready_timeout=$(value "$@"); shift 2 ;;
    --root) root=$(value "$@"); shift 2 ;;
    --systemctl) systemctl=$(value "$@"); shift 2 ;;
    --no-systemctl) systemctl=''; shift ;;
    --purge) purge=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
    esac
done

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
checkout=''
[ ! -f "$here/../pyproject.toml" ] || checkout=$(CDPATH='' cd -- "$here/.." && pwd -P)
if [ -n "$root" ]; then
    mkdir -p "$root"
    root=$(CDPATH='' cd -- "$root" && pwd -P)
    [ "$systemctl" != systemctl ] || systemctl=''
fi
# Whether it is installed for this machine itself, by root.
on_system=yes
if [ -n "$root" ] || [ "$action" = wheelhouse ]; then on_system=no; fi
home=$root/opt/mindstream
versions=$home/versions
current=$home/current
config=$root/etc/mindstream/mindstream.toml
credentials=$root/etc/mindstream/credentials
state=$root/var/lib/mindstream
cache=$root/var/cache/mindstream
units=$root/etc/systemd/system
command=$root/usr/local/bin/mindstream

# --- helpers ------------------------------------------------------------------------------------------------------

find_python() {
    hidden=''
    for candidate in ${python:-python3.11 python3.12 python3.13 python3.10 python3 /usr/bin/python3}; do
        "$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
            >/dev/null 2>&1 || continue
        prefix=$("$candidate" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
        case $on_system:$prefix in
        yes:/home/* | yes:/root/*) hidden=$prefix ;; # ProtectHome=: a service sees nothing of them
        *)
            python=$(command -v "$candidate")
            return
            ;;
        esac
    done
    [ -z "$hidden" ] || die "the Python in $hidden cannot serve: services may not look into home directories" \
        'sudo apt-get install python3 python3-venv, or --python PROGRAM'
    die 'no Python from 3.10 to 3.13 that can make an environment' 'sudo apt-get install python3 python3-venv'
}

on_system() { [ "$on_system" = yes ]; }

# In a chroot, where an image is made, units can be enabled and nothing can be started.
offline() { [ "$("$systemctl" is-system-running 2>/dev/null || true)" = offline ]; }
reload() { [ -z "$systemctl" ] || offline || "$systemctl" daemon-reload; }
property() { "$systemctl" show --property="$1" --value "$2"; }

# What runs now: a version's folder name, or nothing.
installed() { [ ! -L "$current" ] || basename "$(readlink "$current")"; }

# The units that the configuration wants, by the word of one version ($1 is its folder), on one line.
wanted_units() { MINDSTREAM_CONFIG=$config "$1/bin/mindstream" units list | tr '\n' ' '; }

# Whether word $1 is among the words of $2.
among() { case " $2 " in *" $1 "*) return 0 ;; *) return 1 ;; esac }

switch_to() {
    ln -sfn "versions/$1" "$home/current.new"
    mv -fT "$home/current.new" "$current"
}

# --- install and upgrade --------------------------------------------------------------------------------------------

# Sets wheel (ours) and find_links (pip's options for all others).
choose_packages() {
    if [ -z "$wheelhouse" ] && ls "$here"/mindstream-*.whl >/dev/null 2>&1; then wheelhouse=$here; fi
    if [ -n "$wheelhouse" ]; then
        set -- "$wheelhouse"/mindstream-*.whl
        [ -f "$1" ] || die "no mindstream-*.whl in $wheelhouse" "install.sh wheelhouse $wheelhouse, in a checkout"
        [ $# -eq 1 ] || die "several versions in $wheelhouse: $*" 'leave one of them there'
        wheel=$1
        return
    fi
    [ -n "$checkout" ] || die 'there is neither a checkout around this script nor a wheelhouse' 'see --wheelhouse'
    "$python" -m venv "$work/build"
    copy_sources "$work/source"
    SOURCE_DATE_EPOCH=315532800 "$work/build/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
        --wheel-dir "$work" "$work/source" || die "the wheel of $checkout could not be built"
    wheel=$(echo "$work"/mindstream-*.whl)
}

# What a wheel is made of, into $1: its build would leave files, root's, in the checkout.
copy_sources() {
    mkdir "$1"
    for name in pyproject.toml README.md LICENSE protocol edge broker services bench; do
        cp -R "$checkout/$name" "$1/"
    done
}

digest() {
    {
        "$python" -c 'import sys; print(sys.version)'
        echo "$extras" "$also"
        if [ -n "$wheelhouse" ]; then
            (cd "$wheelhouse" && sha256sum ./*.whl)
        else
            sha256sum <"$wheel"
            cat "$checkout/constraints.txt"
        fi
    } | sha256sum | cut -c1-12
}

# Makes the environment of version $1 whole, or leaves nothing. What runs is not touched.
build() {
    target=$versions/$1
    rm -rf "$target"
    mkdir -p "$versions"
    "$python" -m venv "$target"
    if [ -n "$wheelhouse" ]; then
        set -- --no-index --find-links "$wheelhouse"
    else
        set -- --constraint "$checkout/constraints.txt"
    fi
    say "installing $(basename "$wheel") into $target"
    # shellcheck disable=SC2086 # one word a package
    if ! "$target/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" \
        "mindstream${extras:+[$extras]} @ file://$wheel" $also; then
        rm -rf "$target"
        die 'the packages could not be installed; nothing was changed' \
            'look at what pip says above: a wheelhouse must hold all that the extras need, for this Python and machine'
    fi
    printf '%s\n' "$extras" >"$target/extras"
    printf '%s\n' "$also" >"$target/also"
    if [ -f "$config" ] && ! complaint=$("$target/bin/mindstream" --config "$config" config show 2>&1 >/dev/null); then
        rm -rf "$target"
        die "this version does not accept $config; nothing was changed: $complaint"
    fi
    : >"$target/complete"
}

make_user() {
    on_system || return 0
    # The groups that units name (GPU, camera, microphone) must be there, or they do not start.
    for group in $(sed -n 's/^SupplementaryGroups=//p' "$units"/mindstream@*.service.d/*.conf | tr ' ' '\n' | sort -u); do
        getent group "$group" >/dev/null || groupadd --system "$group"
    done
    getent passwd mindstream >/dev/null || useradd --system --user-group --no-create-home --home-dir /var/lib/mindstream \
        --shell /usr/sbin/nologin mindstream
}

make_folders() {
    mkdir -p "$(dirname "$config")" "$credentials" "$state" "$cache" "$(dirname "$command")"
    chmod 0755 "$(dirname "$config")"
    chmod 0750 "$credentials" "$state" "$cache"
    ! on_system || chown mindstream:mindstream "$state" "$cache"
    # The command runs as the user mindstream and asks as the services do, with their password.
    ! on_system || chgrp -R mindstream "$credentials"
    if [ ! -e "$config" ]; then
        cat >"$config" <<TEXT
# Every key: docs/configuration.md; what is in force: mindstream config show
[node]
name = "$node"
data_dir = "/var/lib/mindstream"

[broker]
url = "$broker"
TEXT
        chmod 0644 "$config"
        say "wrote $config"
    fi
    cat >"$command" <<'TEXT'
#!/bin/sh
# Mindstream's command on a device: as the services' user, with their configuration and their secrets.
: "${MINDSTREAM_CONFIG:=/etc/mindstream/mindstream.toml}" "${CREDENTIALS_DIRECTORY:=/etc/mindstream/credentials}"
: "${XDG_CACHE_HOME:=/var/cache}"
export MINDSTREAM_CONFIG CREDENTIALS_DIRECTORY XDG_CACHE_HOME
case "${1-}" in
units | doctor | broker) ;; # these look at, or write, what belongs to root
*)
    if [ "$(id -u)" = 0 ]; then
        exec runuser -u mindstream -- /opt/mindstream/current/bin/mindstream "$@"
    fi
    ;;
esac
exec /opt/mindstream/current/bin/mindstream "$@"
TEXT
    chmod 0755 "$command"
}

# Waits until unit $1 says READY in another life than $2; 1 when it fails or takes too long.
wait_ready() {
    deadline=$(($(date +%s) + ready_timeout))
    while [ "$(date +%s)" -le "$deadline" ]; do
        state_now=$(property ActiveState "$1")
        if [ "$(property InvocationID "$1")" != "$2" ]; then
            [ "$state_now" != active ] || return 0
            # systemd starts it again and again: this will not end well.
            restarts=$(property NRestarts "$1")
            [ "${restarts:-0}" -lt 3 ] || return 1
        fi
        [ "$state_now" != failed ] || return 1
        sleep 0.2
    done
    return 1
}

# Restarts $1 (its state before is $2) and waits for it if it was active.
restart() {
    life=$(property InvocationID "$1")
    "$systemctl" reset-failed "$1" 2>/dev/null || true
    "$systemctl" restart --no-block "$1"
    case $2 in
    active) wait_ready "$1" "$life" ;;
    *) say "$1 was $2 before: it is started again and not waited for" ;;
    esac
}

# Makes $1 the current version (the one before is $2, or nothing) and starts what shall run.
activate() {
    new=$1 old=$2
    "$versions/$new/bin/mindstream" units render --out "$units"
    make_user
    make_folders
    switch_to "$new"
    reload
    [ -n "$systemctl" ] || return 0
    if offline; then
        # shellcheck disable=SC2046 # one word a unit
        "$systemctl" enable --quiet mindstream.target mindstream-sleep.service $(wanted_units "$versions/$new")
        return 0
    fi
    wanted=$(wanted_units "$versions/$new")
    before=''
    [ -z "$old" ] || before=$(wanted_units "$versions/$old")
    done_with=''
    for unit in $wanted; do
        was=$(property ActiveState "$unit")
        if among "$unit" "$before"; then
            [ "$was" != inactive ] || continue # somebody stopped it
        else
            # A service that the version before did not have, or the first of all installations.
            "$systemctl" enable --quiet "$unit"
            [ -z "$old" ] || was=active
        fi
        done_with="$done_with $unit"
        if [ -z "$old" ]; then
            "$systemctl" start --no-block "$unit"
        elif restart "$unit" "$was"; then
            say "$unit runs the new version"
        else
            go_back "$unit"
        fi
    done
    # None may have died while the others came.
    for unit in $done_with; do
        [ -n "$old" ] || wait_ready "$unit" - || say "$unit is not ready yet: $(property StatusText "$unit")"
        [ -z "$old" ] || [ "$(property ActiveState "$unit")" != failed ] || go_back "$unit"
    done
    for unit in $before; do
        among "$unit" "$wanted" || "$systemctl" disable --quiet --now "$unit"
    done
    if [ -z "$old" ]; then
        "$systemctl" enable --quiet mindstream.target mindstream-sleep.service
        "$systemctl" start --no-block mindstream.target
    fi
}

# The new version did not get ready (unit $1): the old one again, for all that were restarted.
go_back() {
    say "$1 did not get ready: $(property ActiveState "$1"), $(property StatusText "$1")"
    switch_to "$old"
    "$versions/$old/bin/mindstream" units render --out "$units"
    reload
    for unit in $done_with; do
        if among "$unit" "$before"; then
            restart "$unit" active || say "$unit is not ready either: $(property StatusText "$unit")"
        else
            "$systemctl" disable --quiet --now "$unit"
        fi
    done
    rm -rf "${versions:?}/$new"
    die "the upgrade to $new failed: $old runs again" "journalctl --unit $1"
}

# Keeps the current version and the one before it.
remove_old_versions() {
    for folder in "$versions"/*; do
        case $(basename "$folder") in
        "$1" | "$2") ;;
        *) rm -rf "$folder" ;;
        esac
    done
}

install() {
    find_python
    mkdir -p "$home"
    exec 9>"$home/lock"
    flock -n 9 || die 'another install.sh is at work'
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    old=$(installed)
    [ "$action" = install ] || [ -n "$old" ] || die 'nothing is installed here' 'install.sh install'
    if [ "$extras_given" = no ] && [ -n "$old" ] && [ -f "$versions/$old/extras" ]; then
        extras=$(cat "$versions/$old/extras")
        also=$(cat "$versions/$old/also")
    fi
    [ -z "$wheelhouse" ] || wheelhouse=$(CDPATH='' cd -- "$wheelhouse" && pwd -P) || die "no folder $wheelhouse"
    choose_packages
    version=$(basename "$wheel" | cut -d- -f2)
    new=$version-$(digest)
    [ -f "$versions/$new/complete" ] || build "$new"
    if [ "$new" = "$old" ] && [ ! -f "$versions/$new/active" ]; then
        # An earlier run was cut short while it restarted services: once more, from the version before.
        old=''
        for folder in "$versions"/*; do
            [ "$folder" = "$versions/$new" ] || [ ! -f "$folder/active" ] || old=$(basename "$folder")
        done
    fi
    if [ "$new" = "$old" ]; then
        # Nothing new to run: what belongs around it is put right, and nothing is restarted.
        "$current/bin/mindstream" units render --out "$units"
        make_user
        make_folders
        reload
        say "mindstream $new is installed already"
        return 0
    fi
    activate "$new" "$old"
    : >"$versions/$new/active"
    remove_old_versions "$new" "${old:-$new}"
    say "mindstream $new is installed${old:+; $old is kept beside it}"
    if [ -z "$old" ] && on_system; then
        say "next: sudo mindstream doctor; sudo mindstream status"
    fi
}

# --- the rest -------------------------------------------------------------------------------------------------------

uninstall() {
    if [ -n "$systemctl" ] && [ -L "$current" ] && ! offline; then
        "$systemctl" disable --quiet --now mindstream.target mindstream-sleep.service || true
        for unit in $(wanted_units "$current" || true); do "$systemctl" disable --quiet --now "$unit" || true; done
    fi
    rm -rf "$units/mindstream.target" "$units/mindstream.target.wants" "$units/mindstream@.service" \
        "$units/mindstream-sleep.service" "$units/sleep.target.wants/mindstream-sleep.service" \
        "$units/multi-user.target.wants/mindstream.target" "$units"/mindstream@*.service.d/10-mindstream.conf
    for folder in "$units"/mindstream@*.service.d; do
        [ ! -d "$folder" ] || rmdir "$folder" 2>/dev/null || say "left your own drop-ins in $folder"
    done
    # `mindstream broker render` has Mosquitto's unit ask the program that goes now.
    mosquitto=$units/mosquitto.service.d/mindstream.conf
    if [ -f "$mosquitto" ] && grep -q "^ExecStartPre=.*$home/.* broker check" "$mosquitto"; then
        sed -i "\\#^ExecStartPre=.*$home/.* broker check#d" "$mosquitto"
        say "left $mosquitto, without its check by mindstream"
    fi
    reload
    rm -rf "$home" "$command"
    if [ "$purge" = no ]; then
        say "mindstream is removed; its data stay in $state, its configuration in $(dirname "$config")"
        say 'to remove them too: install.sh uninstall --purge'
        return 0
    fi
    rm -rf "$state" "$cache" "$(dirname "$config")" "$units"/mindstream@*.service.d
    if on_system && getent passwd mindstream >/dev/null; then userdel mindstream; fi
    say 'mindstream is removed, with its data, its key and its configuration'
}

make_wheelhouse() {
    [ -n "$checkout" ] || die 'a wheelhouse is made in a checkout'
    find_python
    mkdir -p "$wheelhouse"
    rm -f "$wheelhouse"/mindstream-*.whl
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" -m venv "$work/build"
    copy_sources "$work/source"
    # shellcheck disable=SC2086 # one word a package
    "$work/build/bin/python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$wheelhouse" \
        --constraint "$checkout/constraints.txt" "$work/source${extras:+[$extras]}" $also
    cp "$here/install.sh" "$wheelhouse/"
    say "on a machine with the same Python and processor: sudo sh $(basename "$wheelhouse")/install.sh"
}

! on_system || [ "$(id -u)" = 0 ] || die 'this needs root' 'sudo, or --root DIR for a trial'
case $action in
install | upgrade) install ;;
uninstall) uninstall ;;
wheelhouse) make_wheelhouse ;;
esac
