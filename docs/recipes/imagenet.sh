#!/usr/bin/env bash
# PatchSAE at full scale: ImageNet-1k through CLIP ViT-B/16, the stream after block 10 of 0..11, 49,152 latents.
#   docs/recipes/imagenet.sh IMAGENET OUT
# IMAGENET holds train/CLASS/*.JPEG, val/CLASS/*.JPEG and classes.txt with a line such as `n01440764,tench` per class.
#   LAUNCH="torchrun --nproc-per-node 8 --no-python" docs/recipes/imagenet.sh imagenet out   # a node with eight GPUs
#   LAUNCH="srun --ntasks 8 --gpus-per-task 1" docs/recipes/imagenet.sh imagenet out         # inside a SLURM allocation
# The same command goes on where it was interrupted. PARTS names the steps to run; `plan` writes nothing.
set -euo pipefail
imagenet=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
read -ra launch <<<"${LAUNCH:-}"
parts=" ${PARTS-plan extract train encode analyze judge adapt show} "
read -ra model <<<"${MODEL:---model ViT-B-16-quickgelu --pretrained openai}"
read -ra judge <<<"${JUDGE:---judge zero-shot --templates openai}"
read -ra sae <<<"${SAE:---variant relu --l1 8e-5 --lr 4e-4 --warmup-steps 500 --decay-fraction 0}" # PatchSAE's
layer=${LAYER:-10} latents=${LATENTS:-49152} batch=${BATCH:-32}
steps=${STEPS:-20480} rows=${ROWS:-25216} # 20,480 steps of 128 images' 197 tokens: 2,621,440 images, as in the paper
sample=${SAMPLE:-100000}                  # training images on which latents are counted; all of them would take 375 GB
shots=${SHOTS:-16} epochs=${EPOCHS:-5}
runs=(--class-names "$imagenet/classes.txt")

does() { [[ $parts == *" $1 "* ]]; }
spread() { ${launch[@]+"${launch[@]}"} $patchsae "$@"; } # over all processes of the launcher
extract() { spread extract "$imagenet/$1" "$out/$2.acts" "${model[@]}" "${runs[@]}" --layer "$layer" --batch-size "$batch" "${@:3}"; }
mkdir -p "$out"

if does plan; then # images, bytes, whether they fit, and the time on this machine
    for split in train val; do
        $patchsae extract "$imagenet/$split" "$out/$split.acts" "${model[@]}" "${runs[@]}" --layer "$layer" \
            --batch-size "$batch" --dry-run
    done
fi
if does extract; then
    extract train train
    extract train sample --limit "$sample"
    extract val val
    $patchsae verify "$out/val.acts"
fi
if does train; then
    spread train "$out/train.acts" "$out/run" --layer "$layer" "${sae[@]}" --n-latents "$latents" --n-steps "$steps" --batch-size "$rows"
fi
if does encode; then
    for split in sample val; do spread encode "$out/run" "$out/$split.acts" "$out/$split.codes"; done
fi
if does analyze; then # images that the SAE has learned from show what it has learned; the others judge it
    for split in sample val; do
        $patchsae analyze "$out/$split.codes" "$out/$split.concepts" --n-workers "${WORKERS:-8}"
    done
fi
if does judge; then # Table 2 and Figure 5b: the accuracy with the SAE in place, and with few latents of each class
    $patchsae evaluate "$out/run" "$out/val.acts" "$out/fidelity.json" "${judge[@]}" "${runs[@]}"
    $patchsae intervene "$out/run" "$out/val.acts" "$out/masks.json" --chosen-on "$out/sample.codes" "${judge[@]}" "${runs[@]}"
fi
if does adapt; then # Table 1: prompts for half of the classes, and what they change
    $patchsae adapt "$imagenet/train" "$out/maple.prompts" "${model[@]}" "${runs[@]}" --method maple --classes base \
        --shots "$shots" --n-epochs "$epochs" --test "$imagenet/val"
    extract val maple --prompts "$out/maple.prompts"
    spread encode "$out/run" "$out/maple.acts" "$out/maple.codes"
    $patchsae analyze "$out/maple.codes" "$out/maple.concepts" --n-workers "${WORKERS:-8}"
    $patchsae compare "$out/val.concepts" "$out/maple.concepts" "$out/comparison.json" "${runs[@]}" --k 5 --k 50
fi
if does show; then
    results=()
    for name in fidelity masks comparison; do
        if [ -f "$out/$name.json" ]; then results+=(--result "$out/$name.json"); fi
    done
    $patchsae report "$out/val.concepts" "$out/report.html" ${results[@]+"${results[@]}"}
    $patchsae info "$out/run"
fi
