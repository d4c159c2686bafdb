#!/usr/bin/env bash
# Runs the benchmarks on one accelerator and leaves one JSON file.
#
#   benchmarks/accelerator.sh OUT.json [--seconds 350] [--tiny]
#   benchmarks/accelerator.sh --wheels DIR
#
# The machine needs JAX, flax, optax, orbax-checkpoint, safetensors, tabulate and
# matplotlib, and no network. The second form downloads what else is imported, 80 kB
# of wheels; run it where there is a network, and take DIR along as
# benchmarks/wheels, or name it in DST_WHEELS.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
carried=(cachetools gin-config)

if [[ ${1:-} == --wheels ]]; then
  exec "$python" -m pip download --quiet --no-deps --only-binary=:all: \
    --dest "${2:-$here/wheels}" "${carried[@]}"
fi

cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/dst_t5x-accelerator
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import cachetools, gin.config' 2>/dev/null; then
  wheels=${DST_WHEELS:-$here/wheels}
  if ! compgen -G "$wheels/*.whl" >/dev/null; then
    echo "error: cachetools or gin is missing, and there are no wheels in $wheels:" \
      "run $0 --wheels DIR where there is a network" >&2
    exit 1
  fi
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
    --target "$cache/site" "$wheels"/*.whl
  export PYTHONPATH=$PYTHONPATH:$cache/site
fi

# What one method's compilation finds out, products of matrices included, the
# next one reads: JAX keeps XLA's autotuning beside the programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}
# One process at a time has the card, and the largest job needs most of it.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
# The last line of a traceback is then the error.
export JAX_TRACEBACK_FILTERING=off
export PYTHONUNBUFFERED=1

exec "$python" "$here/accelerator.py" "$@"
