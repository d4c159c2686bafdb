#!/usr/bin/env bash
# Functions that the launchers in this folder share; they source this file.

fail() {
  echo "error: $*" >&2
  exit 1
}

# Prints the comment at the beginning of a script.
usage() {
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$1"
}

# Runs a command, or prints it.
run() {
  # shellcheck disable=SC2154  # Each script sets dry_run.
  if [[ $dry_run ]]; then
    printf '%s' "$1"
    shift
    (($# == 0)) || printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Checks training's flags, given as arguments, and that $here can be installed.
check_training() {
  (($#)) || fail "training's flags are missing: put them after --"
  # shellcheck disable=SC2154  # Each script sets here.
  [[ -e $here/setup.py ]] ||
    fail "$here is no checkout: run this from one, which is then installed"
  [[ " $* " =~ MODEL_DIR=[\'\"]*gs:// ]] ||
    fail "set --gin.MODEL_DIR=\"'gs://…'\": the hosts' own disks are lost"
}
