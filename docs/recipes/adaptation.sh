#!/usr/bin/env bash
# What prompts change in a small CLIP that lacks two things: its concepts, or what they are mapped to.
#   docs/recipes/adaptation.sh DATA OUT
# DATA holds cifar10/{train,test}/<class>/*.jpg and clip-cifar/{ViT-CIFAR-4.json,vit_cifar4.safetensors}.
#   ten        all classes; the text side has no words for cat, deer, dog, truck
#   negative   the six classes it has words for, as photographic negatives, which the image side has never seen
set -euo pipefail
data=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
layer=4
model=(--model "$data/clip-cifar/ViT-CIFAR-4.json" --pretrained "$data/clip-cifar/vit_cifar4.safetensors")
mkdir -p "$out/ten"
ln -sfn "$(realpath "$data/cifar10/train")" "$out/ten/train"
ln -sfn "$(realpath "$data/cifar10/test")" "$out/ten/test"
python3 - "$data/cifar10" "$out/negative" <<'PY'
import sys
from pathlib import Path
from PIL import Image, ImageOps
source, out = map(Path, sys.argv[1:])
for name in ("airplane", "automobile", "bird", "frog", "horse", "ship"):
    for file in source.glob(f"*/{name}/*.jpg"):
        copy = (out / file.relative_to(source)).with_suffix(".png")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            ImageOps.invert(Image.open(file).convert("RGB")).save(copy)
PY

adapt() {  # SET NAME flags: learn prompts from 64 images per class
    $patchsae adapt "$out/$1/train" "$out/$1-$2.prompts" "${model[@]}" --test "$out/$1/test" --shots 64 "${@:3}"
}
prompts() {  # SET NAME: the flag that extract needs for an adapted model; none for the base model
    if [ "$2" != base ]; then echo "--prompts $out/$1-$2.prompts"; fi
}
dictionary() {  # SET NAME RUN flags: train an SAE on a model's activations of the training images
    $patchsae extract "$out/$1/train" "$out/$1-$2-train.acts" "${model[@]}" --layer $layer $(prompts "$1" "$2")
    $patchsae train "$out/$1-$2-train.acts" "$out/$1-$3" --layer $layer --n-latents 1536 --k 16 --n-steps 1500 \
        --batch-size 2048 --lr 1e-3 --dead-tokens 250000 "${@:4}"
}
concepts() {  # SET NAME: concepts of a model on the test images, with the SAE of the base model
    $patchsae extract "$out/$1/test" "$out/$1-$2.acts" "${model[@]}" --layer $layer $(prompts "$1" "$2")
    $patchsae encode "$out/$1-sae" "$out/$1-$2.acts" "$out/$1-$2.codes"
    $patchsae analyze "$out/$1-$2.codes" "$out/$1-$2.concepts"
}
compare() {  # SET NAME flags: compare a model with the base model
    $patchsae compare "$out/$1-base.concepts" "$out/$1-$2.concepts" "$out/$1-$2.json" --k 5 --k 10 --k 50 --k 100 \
        --n-random 1 --n-seeds 5 "${@:3}"
}
own=(--method coop --class-specific --n-prompts 4 --lr 20 --batch-size 640 --n-epochs 400)
gentle=(--n-prompts 4 --lr 0.1 --batch-size 32 --n-epochs 10 --no-augment)

adapt ten coop --method coop
adapt ten coop-own "${own[@]}"
adapt ten maple --method maple
adapt ten maple-gentle --method maple "${gentle[@]}"
adapt negative coop-own "${own[@]}"
adapt negative maple --method maple "${gentle[@]}"
adapt negative vpt --method vpt "${gentle[@]}"
for seed in 1 2; do adapt negative maple-$seed --method maple "${gentle[@]}" --seed $seed; done  # different shots and different prompts

dictionary ten base sae
dictionary negative base sae
dictionary negative base sae-again --seed 1
dictionary negative vpt sae-vpt
for name in base coop-own maple-gentle; do concepts ten $name; done
for name in base coop-own maple maple-1 maple-2 vpt; do concepts negative $name; done
for name in coop-own maple-gentle; do compare ten $name; done
for name in coop-own maple maple-1 maple-2; do compare negative $name; done
compare negative vpt --second-run "$out/negative-sae-vpt"
$patchsae compare "$out/negative-base.concepts" "$out/negative-vpt.concepts" "$out/negative-vpt-again.json" --k 50 \
    --n-random 1 --second-run "$out/negative-sae-again"
