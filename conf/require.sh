#!/usr/bin/env bash
# What the machine must have before anything is installed: one clear line for each thing that is missing.
fail() { echo "cannot set up: $1" >&2; exit 6; }
[ "$(uname -s)-$(uname -m)" = "Linux-x86_64" ] || fail "this project is locked for Linux on x86_64."
command -v python3 >/dev/null || fail "install Python 3.11 or 3.12."
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || fail "python3 is $(python3 -V 2>&1 | cut -d' ' -f2): install Python 3.11 or 3.12."
java="${JAVA_HOME:+$JAVA_HOME/bin/}java"
command -v "$java" >/dev/null || fail "install Java 17 (Debian and Ubuntu: apt-get install openjdk-17-jre-headless)."
major=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
[ "${major:-0}" -ge 17 ] || fail "Java ${major:-?} is too old: install Java 17 (Debian and Ubuntu: apt-get install openjdk-17-jre-headless)."
command -v g++ >/dev/null || fail "install a C++ compiler (Debian and Ubuntu: apt-get install g++)."
command -v git >/dev/null || fail "install git (Debian and Ubuntu: apt-get install git)."
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge 10 ] || fail "only ${free} GiB of disk are free here: about 10 GiB are needed for the environment and a run."
exit 0
