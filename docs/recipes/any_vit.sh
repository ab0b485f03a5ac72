#!/usr/bin/env bash
# The whole path through towers that are not CLIPs: a ViT without CLS that was trained on labels, a DINOv2 with registers and a
# SigLIP with random weights; and the names of the first one's concepts by a CLIP that saw the same images.
#   docs/recipes/any_vit.sh DATA OUT
# DATA is as for cifar10.sh. The reports are OUT/{average,registers,siglip}/report.html.
set -euo pipefail
data=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
here=$(dirname "$0")
${PYTHON:-python3} "$here/small_vits.py" "$data/cifar10" "$out/models"

study() {  # TOWER MODEL LAYER LIMIT JUDGE: everything about one tower, judged on the test images
    local to=$out/$1 model=$2 layer=$3 limit=$4
    local judge=(--judge "$5")
    if [ "$5" = probe ]; then judge+=(--probe-store "$to/train.acts"); fi
    mkdir -p "$to"
    for split in train test; do
        $patchsae extract "$data/cifar10/$split" "$to/$split.acts" --model "$model" --layer "$layer" --limit "$limit" --batch-size 64
    done
    $patchsae verify "$to/test.acts"
    $patchsae train "$to/train.acts" "$to/run" --n-latents 1024 --k 16 --n-steps 1000 --batch-size 2048 --lr 1e-3 --dead-tokens 100000
    $patchsae encode "$to/run" "$to/train.acts" "$to/train.codes"
    $patchsae encode "$to/run" "$to/test.acts" "$to/test.codes"
    $patchsae analyze "$to/test.codes" "$to/test.concepts"
    $patchsae evaluate "$to/run" "$to/test.acts" "$to/fidelity.json" "${judge[@]}"
    $patchsae intervene "$to/run" "$to/test.acts" "$to/masks.json" --chosen-on "$to/train.codes" "${judge[@]}" --k 1 --k 10 --k 100
    $patchsae report "$to/test.concepts" "$to/report.html" --result "$to/fidelity.json" --result "$to/masks.json"
}

study average "timm:local-dir:$out/models/average" 4 5000 probe
study registers "timm:local-dir:$out/models/registers" 2 5000 probe
study siglip "local-dir:$out/models/siglip" 10 300 zero-shot

# words for concepts of the ViT that has no text tower
model=(--model "$data/clip-cifar/ViT-CIFAR-4.json" --pretrained "$data/clip-cifar/vit_cifar4.safetensors")
$patchsae extract "$data/cifar10/test" "$out/clip.acts" "${model[@]}" --layer 5 --limit 5000 --batch-size 128
printf '%s\n' airplane automobile bird cat deer dog frog horse ship truck animal vehicle >"$out/words.txt"
$patchsae name "$out/average/test.concepts" --vocabulary "$out/words.txt" --with "$out/clip.acts"
$patchsae report "$out/average/test.concepts" "$out/average/report.html" --result "$out/average/fidelity.json" --result "$out/average/masks.json"
