#!/usr/bin/env bash
# What SAEs are worth beside baselines, on real images and on the demo: four variants, three L0s, two widths and three
# seeds.
#   docs/recipes/benchmark.sh DATA OUT
# DATA holds cifar10/{train,test}/<class>/*.jpg and clip-cifar/{ViT-CIFAR-4.json,vit_cifar4.safetensors}.
# OUT/cifar and OUT/demo get benchmark.json, tables.md, tables.tex, tables.csv and report.html. The same command goes on
# where it was interrupted. For a smaller one, set STEPS=100, SEEDS="0 1" (at least two) or PARTS=cifar.
set -euo pipefail
data=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
parts=${PARTS:-cifar demo}
read -ra seeds <<<"${SEEDS:-0 1 2}"

sweep() {  # STORE RUNS flags: a folder of runs, one for each combination of the flags that are given several times
    $patchsae train "$1" "$2" "${seeds[@]/#/--seed=}" "${@:3}"
}
measure() {  # FOLDER STORE RUN flags -- RUNS...: benchmark, tables, and a report on the concepts of RUN
    local to=$1 store=$2 run=$3 flags=() runs=()
    shift 3
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    runs=("${@:2}")
    $patchsae encode "$run" "$store" "$to/judged.codes"
    $patchsae analyze "$to/judged.codes" "$to/judged.concepts"
    $patchsae benchmark "${runs[@]}" "$store" "$to/benchmark.json" "${flags[@]}" --codes "$to/judged.codes" \
        --table "$to/tables.md" --table "$to/tables.tex" --table "$to/tables.csv"
    $patchsae report "$to/judged.concepts" "$to/report.html" --result "$to/benchmark.json"
}

if [[ " $parts " == *" cifar "* ]]; then
    to=$out/cifar
    mkdir -p "$to"
    # one store of both splits: SAEs learn from one, and the other is judged
    $patchsae extract "$data/cifar10" "$to/images.acts" --model "$data/clip-cifar/ViT-CIFAR-4.json" \
        --pretrained "$data/clip-cifar/vit_cifar4.safetensors" --layer 4 --batch-size 128
    learn=(--where "split == 'train'" --n-steps "${STEPS:-1500}" --batch-size 2048 --lr 1e-3 --dead-tokens 250000)
    wide=("${learn[@]}" --n-latents 1536)
    sweep "$to/images.acts" "$to/runs/topk" "${wide[@]}" --k 8 --k 16 --k 32
    sweep "$to/images.acts" "$to/runs/relu" "${wide[@]}" --variant relu --normalize center --target-l0 16
    sweep "$to/images.acts" "$to/runs/batchtopk" "${wide[@]}" --variant batchtopk --k 16
    sweep "$to/images.acts" "$to/runs/matryoshka" "${wide[@]}" --prefixes 1/8,1/4,1/2,1 --k 16
    sweep "$to/images.acts" "$to/runs/narrow" "${learn[@]}" --n-latents 384 --k 16
    printf '%s\n' "a photo of a {}." "a blurry photo of a {}." "a small {}." "a picture of the {}." "{}" \
        >"$to/templates.txt"
    measure "$to" "$to/images.acts" "$to/runs/topk/k16-seed${seeds[0]}" --where "split == 'test'" \
        --templates "$to/templates.txt" -- "$to/runs/topk" "$to/runs/relu" "$to/runs/batchtopk" "$to/runs/matryoshka" \
        "$to/runs/narrow"
fi

if [[ " $parts " == *" demo "* ]]; then
    to=$out/demo
    $patchsae quickstart "$to"
    learn=(--n-latents 64 --n-steps "${STEPS:-800}" --batch-size 2048 --lr 2e-3 --dead-tokens 100000)
    sweep "$to/scenes.acts" "$to/runs/topk" "${learn[@]}" --k 2 --k 4 --k 8
    sweep "$to/scenes.acts" "$to/runs/relu" "${learn[@]}" --variant relu --normalize center --target-l0 4
    sweep "$to/scenes.acts" "$to/runs/batchtopk" "${learn[@]}" --variant batchtopk --k 4
    sweep "$to/scenes.acts" "$to/runs/matryoshka" "${learn[@]}" --prefixes 1/4,1/2,1 --k 4
    # pairs of scenes that differ in one attribute, with the concepts of each pixel; and other scenes as a second data set
    measure "$to" "$to/pairs.acts" "$to/runs/topk/k4-seed${seeds[0]}" --legend "$to/paired-scenes/truth.parquet" \
        --pairs "$to/paired-scenes/pairs.csv" --transfer "$to/unseen.acts" \
        -- "$to/runs/topk" "$to/runs/relu" "$to/runs/batchtopk" "$to/runs/matryoshka"
fi
