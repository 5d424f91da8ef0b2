#!/usr/bin/env bash
# Trains with the traditional process, on accelerate, and compares the images before and after. With nothing set, on the
# small model and the pictures in assets/; other settings come from the environment, and further arguments go to the
# trainer:
#
#   bash dreambooth.sh
#   bash dreambooth.sh --lora_rank 16
#   MODEL_NAME=CompVis/stable-diffusion-v1-4 INSTANCE_DIR=photos bash dreambooth.sh --max_train_steps 800
#
# The settings are in dreambooth/launch.sh.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/dreambooth/launch.sh"

if [ -n "${PLUGIN:-}${PLACEMENT:-}" ]; then
  echo "${0##*/}: warning: PLUGIN and PLACEMENT have no effect here, but on colossalai.sh" >&2
fi
train_and_compare train_dreambooth.py "$@"
