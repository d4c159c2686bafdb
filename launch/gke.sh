#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, through xpk (pip install xpk):
#
#   launch/gke.sh --name=dst --cluster=… --zone=us-central2-b --type=v5p-64 \
#     -- --gin_file=gin/models/t5_1_1_xl.gin … --gin.MODEL_DIR="'gs://…'"
#
# Submits the training command as a workload whose image contains this checkout.
# The cluster queues it and restarts it after a preemption. Training resumes
# from its last checkpoint in MODEL_DIR, which must be gs://….
#
#   --name=NAME          name of the workload (required)
#   --cluster=CLUSTER    cluster made by `xpk cluster create` (required)
#   --zone=ZONE          (required)
#   --type=TYPE          v4-32, v5litepod-16, v5p-64, … (required)
#   --project=PROJECT    default: the project in gcloud's configuration
#   --slices=N           default: 1
#   --restarts=N         maximum number of restarts (default: 10)
#   --image=IMAGE        base image (default: python:3.12)
#   --env=NAME=VALUE     a variable for training; may be repeated
#   --list               only show the cluster's workloads
#   --delete             only delete the workload
#   --dry_run            only print the commands
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
  --command "pip install --quiet -e '.[tasks,tpu]' && $train"
