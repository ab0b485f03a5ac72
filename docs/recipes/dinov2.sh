#!/usr/bin/env bash
# The same at full scale for DINOv2 with registers, which has no text tower: a linear probe judges, and a CLIP that sees
# the same images gives the words.
#   docs/recipes/dinov2.sh IMAGENET OUT
# IMAGENET, LAUNCH, PARTS and the other variables are those of imagenet.sh; `words` is one more part.
set -euo pipefail
imagenet=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
read -ra launch <<<"${LAUNCH:-}"
read -ra clip <<<"${CLIP:---model ViT-B-16-quickgelu --pretrained openai --layer 10}"
parts=${PARTS:-plan extract train encode analyze judge words show}

imagenet() { PARTS=$1 "$(dirname "$0")/imagenet.sh" "$imagenet" "$out"; }
export MODEL=${MODEL:---model timm:vit_base_patch14_reg4_dinov2.lvd142m --image-size 224}
export JUDGE=${JUDGE:---judge probe --probe-store $out/sample.acts}
export SAE=${SAE:---variant batchtopk --k 32 --tokens patch}
export ROWS=${ROWS:-32768} # 128 images' 256 patches: registers are never learned from, and here CLS is not either

before=${parts/words/}
imagenet "${before/show/}"
if [[ " $parts " == *" words "* ]]; then # of the same images, which stand in the same order
    ${launch[@]+"${launch[@]}"} $patchsae extract "$imagenet/val" "$out/clip.acts" "${clip[@]}" \
        --class-names "$imagenet/classes.txt" --batch-size "${BATCH:-32}"
    $patchsae name "$out/val.concepts" --with "$out/clip.acts"
fi
if [[ " $parts " == *" show "* ]]; then imagenet show; fi
