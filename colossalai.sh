#!/usr/bin/env bash
# Trains with ColossalAI. Settings come from the environment; further arguments go to the trainer:
#
#   INSTANCE_DIR=photos MODEL_NAME=CompVis/stable-diffusion-v1-4 bash colossalai.sh --max_train_steps 800
set -euo pipefail
cd "$(dirname "$0")"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)

export MODEL_NAME=${MODEL_NAME:-CompVis/stable-diffusion-v1-4}       # a folder or a Hub id
export INSTANCE_DIR=${INSTANCE_DIR:-instance_images}                 # 3 to 6 images of the subject
export INSTANCE_PROMPT=${INSTANCE_PROMPT:-a photo of sks dog}
export CLASS_DIR=${CLASS_DIR:-class_images}                          # class images; missing ones are generated
export CLASS_PROMPT=${CLASS_PROMPT:-a photo of dog}
export OUTPUT_DIR=${OUTPUT_DIR:-dreambooth-model}
export PLUGIN=${PLUGIN:-}                                            # empty: chosen by the placement
export PLACEMENT=${PLACEMENT:-cuda}
export NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}                      # processes: one per GPU
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1))}

# One process needs no launcher.
launcher=(python)
if [ "$NPROC" -gt 1 ]; then
  launcher=(torchrun --standalone --nproc_per_node "$NPROC")
fi

exec "${launcher[@]}" train_dreambooth_colossalai.py \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  --instance_data_dir "$INSTANCE_DIR" \
  --instance_prompt "$INSTANCE_PROMPT" \
  --with_prior_preservation \
  --class_data_dir "$CLASS_DIR" \
  --class_prompt "$CLASS_PROMPT" \
  --output_dir "$OUTPUT_DIR" \
  ${PLUGIN:+--plugin "$PLUGIN"} \
  --placement "$PLACEMENT" \
  --train_batch_size 1 \
  --learning_rate 5e-6 \
  --max_train_steps 400 \
  "$@"
