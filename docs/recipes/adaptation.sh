#!/usr/bin/env bash
# A small CLIP whose text side has no words for four of CIFAR-10's classes: adapt it by CoOp and MaPLe, compare concepts.
#   docs/recipes/adaptation.sh DATA OUT
# DATA holds cifar10/{train,test}/<class>/*.jpg and clip-cifar/{ViT-CIFAR-4.json,vit_cifar4.safetensors}.
set -euo pipefail
data=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
layer=4
model=(--model "$data/clip-cifar/ViT-CIFAR-4.json" --pretrained "$data/clip-cifar/vit_cifar4.safetensors")
adapt() { $patchsae adapt "$data/cifar10/train" "$out/$1.prompts" "${model[@]}" --test "$data/cifar10/test" --shots 64 "${@:2}"; }
adapt coop --method coop
adapt coop-own --method coop --class-specific --n-prompts 4 --lr 20 --batch-size 640 --n-epochs 400
adapt maple --method maple
adapt maple-fast --method maple --lr 1 --batch-size 32 --n-epochs 30 --no-augment

$patchsae extract "$data/cifar10/train" "$out/train.acts" "${model[@]}" --layer $layer
$patchsae train "$out/train.acts" "$out/sae" --layer $layer --n-latents 1536 --k 16 --n-steps 1500 --batch-size 2048 \
    --lr 1e-3 --dead-tokens 250000
for name in base coop-own maple-fast; do
    prompts=()
    if [ $name != base ]; then prompts=(--prompts "$out/$name.prompts"); fi
    $patchsae extract "$data/cifar10/test" "$out/$name.acts" "${model[@]}" --layer $layer "${prompts[@]}"
    $patchsae encode "$out/sae" "$out/$name.acts" "$out/$name.codes"
    $patchsae analyze "$out/$name.codes" "$out/$name.concepts"
done
for name in coop-own maple-fast; do
    $patchsae compare "$out/base.concepts" "$out/$name.concepts" "$out/$name.json" --n-random 2
done
