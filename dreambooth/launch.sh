# Sourced by colossalai.sh and dreambooth.sh: the settings that both read from the environment, and train_and_compare.
# With nothing set, the small model in assets/ learns the subject of the pictures beside it.

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
cores=$(env -u OMP_NUM_THREADS nproc)  # which would heed it

if [ -z "${MODEL_NAME:-}" ]; then
  MODEL_NAME=assets/tiny-stable-diffusion
  # One process per GPU; without GPUs two, which generate class images faster than one. A step is 4 samples in all.
  NPROC=${NPROC:-$((gpus > 0 ? gpus : cores > 1 ? 2 : 1))}
  training=(--resolution 128 --train_batch_size $((NPROC < 4 ? 4 / NPROC : 1)) --num_class_images 48
    --learning_rate 4e-4 --lr_scheduler cosine --max_train_steps 350 --seed 0)
  sampling=(--num_inference_steps 25 --guidance_scale 4)
else
  NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
  training=(--train_batch_size 1 --learning_rate 5e-6 --max_train_steps 400)
  sampling=()
fi
INSTANCE_DIR=${INSTANCE_DIR:-assets/instance_images}    # 3 to 6 images of the subject
INSTANCE_PROMPT=${INSTANCE_PROMPT:-a sks dog}
CLASS_PROMPT=${CLASS_PROMPT:-a dog}
CLASS_DIR=${CLASS_DIR:-class_images/${MODEL_NAME##*/}/$CLASS_PROMPT}  # class images; missing ones are generated
OUTPUT_DIR=${OUTPUT_DIR:-dreambooth-model}
COMPARISON=${COMPARISON-comparison.png}                 # images before and after the training; empty for none
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

# Usage: train_and_compare SCRIPT FLAG...
train_and_compare() {
  local argument
  for argument in "${@:2}"; do
    case $argument in
      --output_dir* | --pretrained_model_name_or_path*)
        echo "$1: error: $argument: here OUTPUT_DIR and MODEL_NAME set the folder and the model" >&2
        exit 2
        ;;
    esac
  done
  local launcher=(python)  # one process needs no launcher, and then no process group either
  if [ "$NPROC" -gt 1 ]; then
    launcher=(torchrun --standalone --nproc_per_node "$NPROC")
  fi
  "${launcher[@]}" "$1" \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --instance_data_dir "$INSTANCE_DIR" \
    --instance_prompt "$INSTANCE_PROMPT" \
    --with_prior_preservation \
    --class_data_dir "$CLASS_DIR" \
    --class_prompt "$CLASS_PROMPT" \
    --output_dir "$OUTPUT_DIR" \
    "${training[@]}" \
    "${@:2}"
  if [ -n "$COMPARISON" ]; then
    python inference.py "$OUTPUT_DIR" \
      --compare_with "$MODEL_NAME" \
      --instance_data_dir "$INSTANCE_DIR" \
      --prompt "$INSTANCE_PROMPT on the beach" "$INSTANCE_PROMPT in the snow" "$INSTANCE_PROMPT at night" \
      "$INSTANCE_PROMPT in the desert" "$CLASS_PROMPT on the grass" "a strawberry on a pink background" \
      --num_images 2 \
      "${sampling[@]}" \
      --output "$COMPARISON"
  fi
}
