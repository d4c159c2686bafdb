#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs, from its creation to its deletion.
#
#   launch/tpu_pod.sh --name=dst --zone=us-central2-b --type=v4-128 \
#     -- --gin_file=gin/models/t5_1_1_xl.gin … --gin.MODEL_DIR="'gs://…'"
#
# Creates a queued resource and waits for it, installs this checkout on all of
# its hosts, starts `python -m dst_t5x.train` on all of them, follows the log of
# the first, and deletes the slice when training has ended. A slice that is
# preempted is created again. Training resumes from its last checkpoint, so
# MODEL_DIR must be gs://…. Ctrl-C stops neither the slice nor the training; the
# same command follows the log again.
#
#   --name=NAME          name of the slice and its queued resource (required)
#   --zone=ZONE          (required)
#   --type=TYPE          accelerator: v4-32, v5litepod-16, v5p-64, … (required)
#   --project=PROJECT    default: the project in gcloud's configuration
#   --version=VERSION    software of the VMs; default: depends on the type
#   --spot               cheaper, but may be preempted
#   --on_demand          a VM at once or not at all, instead of a queued resource
#   --keep               do not delete the slice at the end
#   --retries=N          maximum number of further creations (default: 10)
#   --poll=SECONDS       seconds between two checks (default: 30)
#   --env=NAME=VALUE     a variable for training; may be repeated
#   --delete             only delete the slice
#   --dry_run            only print the commands
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here
# Results of watching a slice, besides training's exit status.
readonly LOST=200 DEAD=201
name='' zone='' type='' project='' version=''
spot='' on_demand='' keep='' dry_run='' delete=''
retries=10 poll=30
variables=() flags=()

# shellcheck source=launch/common.sh
source "$here/launch/common.sh"

while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=yes ;;
    --on_demand) on_demand=yes ;;
    --keep) keep=yes ;;
    --retries=*) retries=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --env=*=*) variables+=("${1#*=}") ;;
    --delete) delete=yes ;;
    --dry_run) dry_run=yes ;;
    --help | -h)
      usage "${BASH_SOURCE[0]}"
      exit
      ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) fail "unknown option $1 (--help shows all; training's come after --)" ;;
  esac
  shift
done
[[ $name ]] || fail 'set --name=…'
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "--name=$name: small letters, digits and hyphens, please"
[[ $zone ]] || fail 'set --zone=…, as in us-central2-b'
[[ $type || $delete ]] || fail 'set --type=…, as in v4-32'
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries is no number"
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll is no number"
[[ $delete ]] || check_training "${flags[@]}"
if [[ ! $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  fail 'there is no gcloud: install the Google Cloud CLI'

tpus() { run gcloud compute tpus "$@" "${where[@]}"; }

# Runs a command on a host, or on `all`.
on_host() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# Prints the state of the slice: ACTIVE, PREEMPTED, …, or nothing without one.
state() {
  local kind=(queued-resources describe "$name" --format='value(state.state)')
  [[ ! $on_demand ]] ||
    kind=(tpu-vm describe "$name" --format='value(state)')
  local found
  found=$(tpus "${kind[@]}" 2>/dev/null) || return 0
  [[ $found != READY ]] || found=ACTIVE
  echo "$found"
}

create() {
  local options=()
  [[ ! $spot ]] || options+=(--spot)
  if [[ $on_demand ]]; then
    tpus tpu-vm create "$name" --accelerator-type="$type" \
      --version="$version" "${options[@]}"
  else
    tpus queued-resources create "$name" --node-id="$name" \
      --accelerator-type="$type" --runtime-version="$version" "${options[@]}"
  fi
}

remove() {
  if [[ $on_demand ]]; then
    tpus tpu-vm delete "$name" --quiet
  else
    tpus queued-resources delete "$name" --force --quiet
  fi
}

# Waits until the slice exists; fails if it cannot be created.
wait_until_active() {
  local now before=''
  while true; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$name is ${now:-not there yet}" >&2
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED) return 1 ;;
    esac
    sleep "$poll"
  done
}

# Copies this checkout to all hosts and installs it with its own Python.
install() {
  local archive
  archive=${TMPDIR:-/tmp}/$name-$$.tar.gz
  # Hidden files and runs' results are left out, but gin/runs is needed.
  run tar -C "$here" --exclude='./.*' --exclude=./runs --exclude=__pycache__ \
    -czf "$archive" .
  tpus tpu-vm scp "$archive" "$name:dst_t5x.tar.gz" --worker=all
  run rm "$archive"
  # The VMs' own Python is too old.
  on_host all 'set -e; rm -rf dst_t5x; mkdir dst_t5x
tar -C dst_t5x -xzf dst_t5x.tar.gz; cd dst_t5x
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tasks,tpu]"'
}

# Starts training on all hosts, so that it does not end with this connection.
start() {
  local command=''
  [[ ${#variables[@]} == 0 ]] || command=$(printf '%q ' env "${variables[@]}")
  command+=$(printf '%q ' .venv/bin/python -m dst_t5x.train "${flags[@]}")
  on_host all "cd dst_t5x; rm -f status
nohup setsid bash -c $(printf %q "$command; echo \$? > status") \
>> log.txt 2>&1 < /dev/null & echo \$! > pid"
}

# Follows the first host's log until training has ended there.
follow() {
  # shellcheck disable=SC2016  # Meant for the host's shell.
  on_host 0 'cd dst_t5x; touch log.txt; tail -n 20 -F log.txt & t=$!
while [ ! -s status ] && kill -0 "$(cat pid)" 2>/dev/null; do sleep 1; done
sleep 1; kill $t'
}

# Makes each host print training's exit status, or `dead` if there is none.
statuses() {
  # shellcheck disable=SC2016
  on_host all 'cd dst_t5x; cat status 2>/dev/null ||
kill -0 "$(cat pid)" 2>/dev/null || echo dead'
}

# Prints the worst exit status, or nothing while training continues.
status() {
  statuses 2>/dev/null | grep -E '^([0-9]+|dead)$' | sort -rn | head -n 1 ||
    true
}

# Whether training has been started on the slice that is there.
is_started() {
  on_host 0 'test -e dst_t5x/pid' 2>/dev/null
}

# Follows training to its end; returns its exit status, or LOST, or DEAD.
watch() {
  local code
  while true; do
    follow || true # The connection may break, the slice may be gone.
    code=$(status)
    # Training ends with 143 where the host was told to stop: it may be going.
    [[ $code != 143 ]] || sleep "$poll"
    [[ $(state) == ACTIVE ]] || return "$LOST"
    case $code in
      dead | 143) return "$DEAD" ;; # A host was restarted, most likely.
      ?*) return "$code" ;;
    esac
    sleep "$poll"
  done
}

if [[ $delete ]]; then
  remove
  exit
fi
if [[ $dry_run ]]; then
  create
  state
  install
  start
  follow
  statuses
  [[ $keep ]] || remove
  exit
fi

trap 'echo "$name goes on; the same command watches it, --delete ends it" >&2
exit 130' INT TERM

# Says why there is another attempt, unless there were enough.
again() {
  ((attempt < retries)) || fail "$name $1, $((attempt + 1)) times by now"
  echo "$name $1: once more" >&2
}

for ((attempt = 0; ; attempt++)); do
  [[ $(state) ]] || create
  code=$LOST
  if wait_until_active; then
    if ! is_started; then
      install
      start
    fi
    code=0
    watch || code=$?
  fi
  case $code in
    "$LOST")
      again 'is gone'
      remove || true
      ;;
    "$DEAD")
      again 'has lost its training'
      on_host all 'rm -f dst_t5x/pid'
      ;;
    *) break ;;
  esac
done
[[ $keep ]] || remove
((code == 0)) || fail "training ended with exit status $code; see MODEL_DIR"
