#!/usr/bin/env bash
# Trains with ColossalAI, and compares the images before and after. With nothing set, on the small model and the pictures
# in assets/; other settings come from the environment, and further arguments go to the trainer:
#
#   bash colossalai.sh
#   bash colossalai.sh --lora_rank 16
#   MODEL_NAME=CompVis/stable-diffusion-v1-4 INSTANCE_DIR=photos bash colossalai.sh --max_train_steps 800
#
# PLUGIN and PLACEMENT choose the strategy; the other settings are in dreambooth/launch.sh.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/dreambooth/launch.sh"

train_and_compare train_dreambooth_colossalai.py \
  ${PLUGIN:+--plugin "$PLUGIN"} \
  ${PLACEMENT:+--placement "$PLACEMENT"} \
  "$@"
