#!/bin/sh
# Put the QEMU of Debian trixie (10.0.13 or later of the 10.0 branch) under DIR on any Debian 12 or 13 machine, without installing it:
#
#   tests/tools/get-qemu.sh DIR     ->  DIR/root  the extracted packages
#                                       DIR/bin   wrappers: qemu-img, qemu-io, qemu-storage-daemon  (for --qemu-dir)
#
# Debian 12 carries QEMU 7.2, which writes wrong data through a FUSE export. On Debian 13 the same way is used, so that
# tests run the same binaries everywhere. Needs root and mmdebstrap. Does nothing if DIR already holds a good QEMU.
# An interrupted run leaves at most DIR.tmp, which the next one removes.
set -eu

minimum=10.0.13

fail() {
  echo "get-qemu: $*" >&2
  exit 1
}

# Print the three numbers of a QEMU's version, or nothing.
version_of() {
  "$1/bin/qemu-img" --version 2>/dev/null | sed -n '1s/^qemu-img version \([0-9]*\.[0-9]*\.[0-9]*\).*/\1/p'
}

is_good() {
  version=$(version_of "$1")
  [ -n "$version" ] && dpkg --compare-versions "$version" ge "$minimum"
}

# Print the address of the Debian archive that this machine's apt uses: apt itself reads its sources, whatever their
# format. The security and backports archives have other paths and suites, so the plain release is picked by its name.
mirror() {
  . /etc/os-release
  apt-get indextargets --format '$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI)' |
    awk -v suite="${VERSION_CODENAME:-none}" '
      $1 == "Packages" && $2 == "main" && ($3 == suite || $3 == "stable" || $3 == "oldstable") { print $4; exit }'
}

# The wrapper execs, so that the process that a caller starts is QEMU itself: its pid, its signals, its exit status.
# QEMU finds its block drivers (modules) through QEMU_MODULE_DIR and its libraries through the loader that came with it.
write_wrapper() {
  name=$1
  cat > "$tmp/bin/$name" <<WRAPPER
#!/bin/sh
export QEMU_MODULE_DIR='$dir/root/usr/lib/$triplet/qemu'
exec '$dir/root$loader' --argv0 $name --library-path '$dir/root/usr/lib/$triplet' '$dir/root/usr/bin/$name' "\$@"
WRAPPER
  chmod 755 "$tmp/bin/$name"
}

[ $# -eq 1 ] || fail "usage: get-qemu.sh DIR"
dir=$(realpath -m -- "$1")
case $dir in *\'*) fail "DIR must not contain a quote: $dir" ;; esac
if is_good "$dir"; then
  echo "QEMU $(version_of "$dir") is in $dir/bin"
  exit 0
fi
if [ -e "$dir" ] && [ ! -e "$dir/bin/qemu-img" ]; then
  rmdir -- "$dir" 2> /dev/null || fail "$dir exists and was not made by this script: give another directory"
fi
[ "$(id -u)" = 0 ] || fail "needs root to extract packages"
command -v mmdebstrap > /dev/null || fail "mmdebstrap is missing: apt-get install mmdebstrap"
case $(dpkg --print-architecture) in
  amd64) triplet=x86_64-linux-gnu loader=/usr/lib64/ld-linux-x86-64.so.2 ;;
  arm64) triplet=aarch64-linux-gnu loader=/usr/lib/ld-linux-aarch64.so.1 ;;
  *) fail "this architecture is not known here: $(dpkg --print-architecture)" ;;
esac
archive=$(mirror)
[ -n "$archive" ] || fail "apt on this machine has no Debian archive configured (apt-get indextargets shows none)"

tmp=$dir.tmp
rm -rf -- "$tmp"
mkdir -p -- "$tmp/bin"
trap 'rm -rf -- "$tmp"' EXIT
mmdebstrap --quiet --variant=extract --include=qemu-utils,qemu-system-common,qemu-block-extra trixie "$tmp/root" "$archive" ||
  fail "mmdebstrap could not extract Debian trixie"
for name in qemu-img qemu-io qemu-storage-daemon; do
  [ -x "$tmp/root/usr/bin/$name" ] || fail "the packages of Debian trixie hold no $name"
  write_wrapper "$name"
done
rm -rf -- "$dir"
mv -- "$tmp" "$dir"
is_good "$dir" || fail "QEMU in Debian trixie is '$(version_of "$dir")', $minimum is needed; it stays in $dir for a look"
echo "QEMU $(version_of "$dir") is in $dir/bin"
