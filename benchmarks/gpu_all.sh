#!/usr/bin/env bash
# bash benchmarks/gpu_all.sh FOLDER [tests step runs evaluation processes compile]    measures on a GPU, in 12 minutes
#
# FOLDER is a data set with one Karpathy JSON (dataset_*.json) and JPEG photographs of 640 x 480, e.g. COCO's; TRAIN=FILE
# names another JSON for training; $CLIP_RETRIEVAL_DATA has the captions (see train_step.py). Prints Markdown tables as they
# are measured. A command that fails or reaches its limit is reported, and the next one runs. TINY=1 runs everything with the
# smallest settings, also on a CPU, to check the commands.
set -uo pipefail
folder=$(realpath "${1:?give the folder of a data set}")
TRAIN=${TRAIN:+$(realpath "$TRAIN")}
cd "$(dirname "$0")/.." || exit
shift
parts=" ${*:-tests step runs evaluation processes compile} "
python=${PYTHON:-python3}
total=720
train=(${TRAIN:+--annotations "$TRAIN"})

# settings
step="--repeats 3 --steps 4"
large="ViT-B/32" other=(ViT-B/16 ViT-L/14 ViT-B-16-SigLIP2-256) batch=256 steps=60 rows=(step gpu fast image_cache pillow)
images=5000 tests=tests
if [ -n "${TINY:-}" ]; then
    step="--repeats 1 --steps 1" large=tiny other=() batch=4 steps=25 rows=(step fast) images=8 tests=tests/test_process_group.py
fi
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    decoder=fast compiled=(graph compile)
else
    decoder=gpu compiled=(varlen graph compile)
fi

measure() { # measure SECONDS COMMAND...: run a command within its limit and the total one
    local limit=$1 left=$((total - SECONDS)) code=0
    shift
    printf '\n$ %s\n' "$*"
    if [ "$left" -lt 10 ]; then
        echo "(not run: no time left)"
        return
    fi
    timeout --kill-after=10 $((limit < left ? limit : left)) "$@" || code=$?
    [ "$code" -eq 0 ] || echo "(exit code $code after at most $limit s)"
    echo "($SECONDS s so far)"
}

has() { [[ $parts == *" $1 "* ]]; }

run_main() { # run_main PROCESSES NAME ARGUMENTS...: a short finetune or evaluation in several processes
    local processes=$1 name=$2
    shift 2
    measure 90 "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" main.py \
        --checkpoint_path "$logs" --experiments "$name" "$@"
}

if has tests; then
    measure 180 "$python" -m pytest -m gpu -q --maxfail 20 -p no:cacheprovider "$tests"
fi
if has step; then
    for size in "$batch" $((4 * batch)); do
        measure 60 "$python" benchmarks/train_step.py --models "$large" --batch_sizes "$size" --only open_clip ours grad_cache $step
    done
    for model in ${other[@]+"${other[@]}"}; do
        measure 75 "$python" benchmarks/train_step.py --models "$model" --batch_sizes "$batch" --only open_clip ours $step
    done
fi
if has runs; then
    measure 200 "$python" benchmarks/end_to_end.py "$folder" ${train[@]+"${train[@]}"} --models "$large" --batch_size "$batch" --steps "$steps" --rows "${rows[@]}"
    [ -n "${TINY:-}" ] || measure 80 "$python" benchmarks/end_to_end.py "$folder" ${train[@]+"${train[@]}"} --models ViT-L/14 --batch_size "$batch" \
        --steps 40 --rows step gpu
fi
if has evaluation; then
    measure 60 "$python" benchmarks/evaluation.py --vision_model "$large" --dataset karpathy --dataset_root "$folder" \
        --images "$images" --rows ours "$decoder" bf16
fi
if has processes; then
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"' EXIT
    finetune=(--dataset karpathy --dataset_root "$folder" ${train[@]+"${train[@]}"} --vision_model "$large" --pretrained none
        --no_eval_first --batch_size "$batch" --max_steps 10 --display 5 --eval_every 0 --decoder "$decoder" --seed 1)
    run_main 1 one "${finetune[@]}"
    run_main 2 two "${finetune[@]}"
    run_main 2 evaluated --eval --resume "$logs/two/last.pt" --eval_split val
fi
if has compile; then
    for model in "$large" ${other[@]+"${other[@]}"}; do
        for row in "${compiled[@]}"; do  # apart, because the graphs of a row keep their memory
            measure 90 "$python" benchmarks/train_step.py --models "$model" --batch_sizes "$batch" --only open_clip ours "$row" $step
        done
    done
fi
