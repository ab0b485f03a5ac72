#!/usr/bin/env bash
# CIFAR-10 through a small trained CLIP: extract, train TopK SAEs (k 16, 32, 64), encode, analyze, report; then PCA for comparison.
#   docs/recipes/cifar10.sh DATA OUT
# DATA holds cifar10/{train,test}/<class>/*.jpg and clip-cifar/{ViT-CIFAR-4.json,vit_cifar4.safetensors}.
set -euo pipefail
data=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
here=$(dirname "$0")
layer=4
model=(--model "$data/clip-cifar/ViT-CIFAR-4.json" --pretrained "$data/clip-cifar/vit_cifar4.safetensors")
for split in train test; do
    $patchsae extract "$data/cifar10/$split" "$out/$split.acts" "${model[@]}" --layer 3 --layer $layer --batch-size 128
    $patchsae verify "$out/$split.acts"
done
for k in 16 32 64; do
    $patchsae train "$out/train.acts" "$out/run-k$k" --layer $layer --n-latents 1536 --k $k \
        --n-steps 1500 --batch-size 2048 --lr 1e-3 --dead-tokens 250000
    # measure it on the test images, which the run has never seen
    ${PYTHON:-python3} - "$out/run-k$k" "$out/test.acts" <<'PYTHON'
import sys
from actcache import ActivationStore
from saetrain import Run, evaluate

run, store = Run.open(sys.argv[1]), ActivationStore.open(sys.argv[2])
quality = evaluate(run.sae(), store, run.hook_point, range(store.n_images))
print(f"TopK k {run.sae_config.k}: test FVU {quality['all']['fvu']:.4f}  L0 {quality['all']['l0']:.1f}  dead {run.quality['dead']:.1%}")
PYTHON
done
${PYTHON:-python3} "$here/pca.py" "$out/train.acts" "$out/test.acts" $layer 16 32 64
$patchsae encode "$out/run-k16" "$out/train.acts" "$out/train.codes"
$patchsae analyze "$out/train.codes" "$out/train.concepts"
$patchsae report "$out/train.concepts" "$out/report.html"
$patchsae query "$out/train.codes" --class frog --n-top 5
