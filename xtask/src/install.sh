# Installs Debian packages, as root; `packages.rs` runs it with their names.
#
# One script, so that sudo asks once, and so that what is put in the way of services
# is taken out again whatever happens in between.
set -eu
# apt's progress goes where its words go. Not through descriptor 1: apt would close it for
# the packages' own scripts, and one of them fails with "echo: I/O error".
exec 2>&1 3>&1
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

policy=/usr/sbin/policy-rc.d
mark='dist-ctl: cargo xtask is installing packages'
before=$(dpkg-query -W -f '${Package}\n')

finish() {
    if grep -qs "$mark" $policy; then rm -f $policy; fi
    # The policy was asked about now. At the next boot, what is enabled would be started.
    command -v systemctl >/dev/null || return 0
    { printf '%s\n' "$before" "$before"; dpkg-query -W -f '${Package}\n'; } | sort | uniq -u |
        while read -r new; do
            dpkg -L "$new" | sed -n 's,^\(/usr\)\?/lib/systemd/system/\([^/@]*\.service\)$,\2,p'
        done | xargs -r systemctl --quiet --no-reload disable
}
trap finish EXIT
trap 'exit 130' HUP INT TERM

# Debian starts a service as soon as its package is there. The tests want the program nginx,
# not a server on port 80; whoever set a policy of their own keeps it.
if [ ! -e $policy ]; then
    printf '#!/bin/sh\n# %s\nexit 101\n' "$mark" >$policy
    chmod 755 $policy
fi

apt() { apt-get -y -q -o APT::Status-Fd=3 -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@"; }

# "dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct the problem."
# It fails as long as something that was unpacked waits for something that was not.
dpkg --configure -a || :
# "Unmet dependencies. Try 'apt --fix-broken install' with no packages".
apt-get check -qq || apt --no-install-recommends --no-remove --fix-broken install

# Without --no-remove, Debian's own cargo would silently give way to rustc-web's.
apt --no-install-recommends --no-remove install "$@"
