#!/usr/bin/env bash
# Extract two layers of full-size photographs with ViT-B-16, from a random checkpoint saved as a file. Downloads nothing.
#   docs/recipes/photos.sh PHOTOS OUT
set -euo pipefail
photos=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
mkdir -p "$out"
[ -f "$out/vit-b-16.safetensors" ] || ${PYTHON:-python3} - "$out/vit-b-16.safetensors" <<'PYTHON'
import sys
import open_clip
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, sys.argv[1])
PYTHON
$patchsae extract "$photos" "$out/photos.acts" --model ViT-B-16 --pretrained "$out/vit-b-16.safetensors" \
    --layer 10 --layer 5 --shard-images 64 --batch-size 16
$patchsae info "$out/photos.acts"
$patchsae verify "$out/photos.acts"
