#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, through xpk (pip install xpk):
#
#   launch/gke.sh --name=dst --cluster=… --zone=us-central2-b --type=v5p-64 \
#     -- --gin_file=gin/models/t5_1_1_xl.gin … --gin.MODEL_DIR="'gs://…'"
#
# Hands the training command over as a workload, with this checkout in its
# image; the cluster queues it, and starts it again where it is preempted:
# training goes on from its last checkpoint in MODEL_DIR, a gs://….
#
#   --name=NAME          of the workload (required)
#   --cluster=CLUSTER    made by `xpk cluster create` (required)
#   --zone=ZONE          (required)
#   --type=TYPE          v4-32, v5litepod-16, v5p-64, … (required)
#   --project=PROJECT    default: that of gcloud's configuration
#   --slices=N           default: 1
#   --restarts=N         how often to start again (default: 10)
#   --image=IMAGE        that this checkout is put into (default: python:3.12)
#   --env=NAME=VALUE     a variable for training; may be repeated
#   --list               show the cluster's workloads, and no more
#   --delete             delete the workload, and no more
#   --dry_run            print every command, and run none
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here
name='' cluster='' zone='' type='' project='' dry_run='' mode=create
slices=1 restarts=10 image=python:3.12
variables=() flags=()

# shellcheck source=launch/common.sh
source "$here/launch/common.sh"

while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --env=*=*) variables+=(--env "${1#*=}") ;;
    --list) mode=list ;;
    --delete) mode=delete ;;
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
[[ $cluster ]] || fail 'set --cluster=…'
[[ $zone ]] || fail 'set --zone=…, as in us-central2-b'
where=(--cluster "$cluster" --zone "$zone")
[[ ! $project ]] || where+=(--project "$project")
[[ $dry_run ]] || command -v xpk >/dev/null ||
  fail 'there is no xpk: pip install xpk'

if [[ $mode == list ]]; then
  run xpk workload list "${where[@]}"
  exit
fi
[[ $name ]] || fail 'set --name=…'
[[ $name =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] ||
  fail "--name=$name: at most 39 small letters, digits and hyphens, please"
if [[ $mode == delete ]]; then
  run xpk workload delete --workload "$name" "${where[@]}"
  exit
fi
[[ $type ]] || fail 'set --type=…, as in v5p-64'
check_training "${flags[@]}"
train=$(printf '%q ' python -m dst_t5x.train "${flags[@]}")
cd "$here"
run xpk workload create --workload "$name" "${where[@]}" \
  --tpu-type "$type" --num-slices "$slices" --max-restarts "$restarts" \
  --base-docker-image "$image" --script-dir . "${variables[@]}" \
  --command "pip install --quiet -e '.[tpu]' && $train"
