#!/usr/bin/env bash
# What latents mean, and what the classifier does without them: every measurement, on real images and on the demo.
#   docs/recipes/cifar10.sh DATA OUT && docs/recipes/concepts.sh DATA OUT
# Latents are chosen on one set of images and judged on another. The reports are OUT/cifar/report.html and OUT/demo/report.html.
set -euo pipefail
data=$1 out=$2
patchsae=${PATCHSAE:-patchsae}
mkdir -p "$out/cifar"

study() {  # RUN CHOSEN JUDGED TO TEMPLATES WORDS K...: CHOSEN.codes and JUDGED.acts must exist; TO is the folder for results
    local run=$1 chosen=$2 judged=$3 to=$4 templates=$5 words=$6
    local grid=("${@:7}")
    $patchsae encode "$run" "$judged.acts" "$judged.codes"
    $patchsae analyze "$judged.codes" "$to/judged.concepts" --embeddings clip
    $patchsae name "$to/judged.concepts" --vocabulary "$words"
    $patchsae evaluate "$run" "$judged.acts" "$to/fidelity.json" --templates "$templates"
    for tokens in cls patch; do
        $patchsae evaluate "$run" "$judged.acts" "$to/fidelity-$tokens.json" --templates "$templates" --tokens $tokens
    done
    $patchsae intervene "$run" "$judged.acts" "$to/masks.json" --chosen-on "$chosen.codes" --templates "$templates" \
        "${grid[@]/#/--k=}"
    $patchsae attribute "$run" "$judged.acts" "$to/deletion.json" --templates "$templates"
    $patchsae steer "$run" "$judged.acts" "$to/steerability.json" --vocabulary "$words" --strength 10 --strength 50
    $patchsae rules "$chosen.codes" "$to/rules.json" --judge "$judged.codes"
    $patchsae inspect "$run" --store "$judged.acts"
    $patchsae query "$judged.codes" --sample 20000 --n-top 3
    $patchsae report "$to/judged.concepts" "$to/report.html" --result "$to/fidelity.json" --result "$to/masks.json" \
        --result "$to/deletion.json" --result "$to/steerability.json" --result "$to/rules.json"
}

printf '%s\n' "a photo of a {}." "a blurry photo of a {}." "a small {}." "a picture of the {}." "{}" >"$out/cifar/templates.txt"
printf '%s\n' airplane automobile bird cat deer dog frog horse ship truck animal vehicle >"$out/cifar/words.txt"
study "$out/run-k16" "$out/train" "$out/test" "$out/cifar" "$out/cifar/templates.txt" "$out/cifar/words.txt" 1 2 5 10 50 100 500
$patchsae query "$out/test.codes" --group "label_name == 'ship'" --versus "label_name == 'airplane'" --n-top 5

$patchsae quickstart "$out/demo"
printf '%s\n' red green blue yellow purple cyan white circle square triangle star cross ring solid striped dotted checkered \
    small large grass sky sand night brick >"$out/demo/words.txt"
study "$out/demo/run" "$out/demo/scenes" "$out/demo/unseen" "$out/demo" photo "$out/demo/words.txt" 1 2 5 10 20
$patchsae localize "$out/demo/unseen.codes" --legend "$out/demo/unseen-scenes/truth.parquet"
