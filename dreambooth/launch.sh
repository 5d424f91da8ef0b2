# Sourced by colossalai.sh and dreambooth.sh: the settings that both read from the environment, and train_and_compare.
# With nothing set, the small model in assets/ learns the subject of the pictures beside it.
#
# Paths are of the folder that the user is in, as with every command; only what is in assets/ belongs to the project.

project=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
cores=$(env -u OMP_NUM_THREADS nproc)  # which would heed it
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # threads that wait for each other leave the cores to others

# Ends the launcher with a line.
fail() {
  echo "${0##*/}: error: $1" >&2
  exit 2
}

# Runs a command, and ends it by the signals that may come to the launcher alone, as from `kill`, a scheduler or `docker
# stop`: a shell that waits for a command in the foreground ends by them itself, or as process 1 does nothing, and the
# command goes on. Ctrl-C reaches both.
run() {
  local child status again
  (trap - INT QUIT; exec "$@") &  # which the shell has commands in the background ignore
  child=$!
  trap 'again=yes; kill -TERM "$child" 2>/dev/null || true' TERM USR1  # torchrun does not know the latter
  trap 'again=yes' INT
  while
    status=0 again=""
    wait "$child" || status=$?
    [ -n "$again" ]  # a signal has ended the waiting, not the command
  do :; done
  trap - TERM USR1 INT
  return "$status"
}

# Prints how many GPUs torch sees: nvidia-smi also lists those that CUDA_VISIBLE_DEVICES hides, and parts of one. It is
# asked first, as torch takes seconds to answer.
count_gpus() {
  local listed
  listed=$(nvidia-smi --list-gpus 2>/dev/null || true)
  if [ "${CUDA_VISIBLE_DEVICES-all}" != "" ] && [[ $listed == GPU* ]]; then
    # Not with a torch.py of the user's own, in this folder.
    python -c 'import sys; del sys.path[0]; import torch; print(torch.cuda.device_count())'
  else
    echo 0
  fi
}

adapters=""  # whether they alone are trained
for argument in "$@"; do
  case $argument in --lora_rank | --lora_rank=* | --rank | --rank=*) adapters=yes ;; esac
done
if [ -z "${NPROC:-}" ]; then
  gpus=$(count_gpus)
elif [[ ! $NPROC =~ ^[1-9][0-9]*$ ]]; then
  fail "NPROC=$NPROC is no number of processes, such as 2"
fi
if [ -z "${MODEL_NAME:-}" ]; then
  MODEL_NAME=$project/assets/tiny-stable-diffusion
  # One process per GPU; without GPUs two, which generate class images faster than one. A step is 4 samples in all.
  NPROC=${NPROC:-$((gpus > 0 ? gpus : cores > 1 ? 2 : 1))}
  training=(--resolution 128 --train_batch_size $((NPROC < 4 ? 4 / NPROC : 1)) --num_class_images 48
    --lr_scheduler cosine --seed 0)
  if [ -n "$adapters" ]; then
    training+=(--lora_target_modules all --learning_rate 7e-3 --max_train_steps 150)
  else
    training+=(--learning_rate 4e-4 --max_train_steps 350)
  fi
  sampling=(--num_inference_steps 25 --guidance_scale 4)
else
  # One process per GPU, each with a sample at a time, for the memory that a GPU has. So N GPUs see N times the samples
  # in as many steps: the gradients are less noisy, but the rate and the number of steps stay, and so does the time.
  NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
  training=(--train_batch_size 1 --max_train_steps 400)  # at the trainers' own rates, of adapters another
  sampling=()
fi
INSTANCE_DIR=${INSTANCE_DIR:-$project/assets/instance_images}  # 3 to 6 images of the subject
INSTANCE_PROMPT=${INSTANCE_PROMPT:-a sks dog}
CLASS_PROMPT=${CLASS_PROMPT:-a dog}
OUTPUT_DIR=${OUTPUT_DIR:-${adapters:+dreambooth-lora}}  # they do not replace a whole model
OUTPUT_DIR=${OUTPUT_DIR:-dreambooth-model}
COMPARISON=${COMPARISON-comparison.png}  # images before and after the training; empty for none

# Class images; missing ones are generated. The default folder is of one model and one prompt: its name tells apart models
# whose paths end alike.
if [ -z "${CLASS_DIR:-}" ]; then
  model=$MODEL_NAME
  while [[ $model == ?*/ ]]; do
    model=${model%/}
  done
  if [ -d "$model" ]; then
    model=$(readlink -f "$model")
  fi
  hash=$(printf %s "$model" | sha256sum)
  CLASS_DIR=class_images/${model##*/}-${hash:0:8}/${CLASS_PROMPT//\//_}
fi

# Flags of the trainer that the comparison has to agree with, and the settings that stand for them.
declare -A SETTINGS=(
  [--pretrained_model_name_or_path]=MODEL_NAME
  [--instance_data_dir]=INSTANCE_DIR
  [--instance_prompt]=INSTANCE_PROMPT
  [--class_data_dir]=CLASS_DIR
  [--class_prompt]=CLASS_PROMPT
  [--output_dir]=OUTPUT_DIR
)

# Usage: train_and_compare SCRIPT FLAG...
train_and_compare() {
  local script=$1 argument flag previous="" launcher=(python) before=() trained=("$OUTPUT_DIR") compared=yes
  shift
  for argument in "$@"; do
    flag=${argument%%=*}
    if [ -n "$flag" ] && [ -n "${SETTINGS[$flag]:-}" ]; then
      fail "$flag: set ${SETTINGS[$flag]} in the environment instead, which the comparison follows too"
    fi
    case $previous$argument in
      --revision=* | --variant=* | --single_file_config=*) before+=("$previous$argument") ;;  # of the model before the training
    esac
    previous=""
    case $argument in
      --revision | --variant | --single_file_config) previous=$argument= ;;
      --external_unet_path* | --externel_unet_path* | --pretrained_vae_model_name_or_path* | --tokenizer_name*)
        if [ -n "$COMPARISON" ]; then
          fail "${argument%%=*}: the comparison would show MODEL_NAME with its own before the training; set COMPARISON= for none"
        fi
        ;;
      --dataset_name | --dataset_name=*) fail "--dataset_name: set INSTANCE_DIR, or call $script itself for a data set" ;;
      --dry_run) compared="" ;;  # there is nothing to compare afterwards
      --help | -h) COMPARISON= NPROC=1 ;;  # torchrun would import torch first
    esac
  done
  if [ -n "$COMPARISON" ]; then  # known now, and not after the training
    # By its file: with -m a dreambooth.py of the user's own in this folder would be taken for ours.
    PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} python "$project/dreambooth/run/image_file.py" "$COMPARISON"
  fi
  if [ "$NPROC" -gt 1 ]; then  # one process needs no launcher, and then no process group either
    launcher=(torchrun --standalone --nproc_per_node "$NPROC")
  fi
  # The processes share the cores. What comes after them has all.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))} run "${launcher[@]}" "$project/$script" \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --instance_data_dir "$INSTANCE_DIR" \
    --instance_prompt "$INSTANCE_PROMPT" \
    --with_prior_preservation \
    --class_data_dir "$CLASS_DIR" \
    --class_prompt "$CLASS_PROMPT" \
    --output_dir "$OUTPUT_DIR" \
    "${training[@]}" \
    "$@"
  if [ -n "$COMPARISON" ] && [ -n "$compared" ]; then
    if [ -n "$adapters" ]; then
      trained=("$MODEL_NAME" --lora "$OUTPUT_DIR")
    fi
    run python "$project/inference.py" "${trained[@]}" \
      --compare_with "$MODEL_NAME" \
      "${before[@]}" \
      --instance_data_dir "$INSTANCE_DIR" \
      --prompt "$INSTANCE_PROMPT on the beach" "$INSTANCE_PROMPT in the snow" "$INSTANCE_PROMPT at night" \
      "$INSTANCE_PROMPT in the desert" "$CLASS_PROMPT on the grass" "a strawberry on a pink background" \
      --num_images 2 \
      "${sampling[@]}" \
      --output "$COMPARISON"
  fi
}
