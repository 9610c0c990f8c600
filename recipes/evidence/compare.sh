#!/usr/bin/env bash
# Makes a table of README.md again: one teacher, then students by several losses and seeds.
#
#   LOSSES="cross-entropy kd dkd cakd-logits cakd" \
#       bash recipes/evidence/compare.sh fashion-mnist runs/fashion-mnist --data-root FOLDER
#   LOSSES="cross-entropy kd dkd gdkd cmkd dist cakd" \
#       bash recipes/evidence/compare.sh glyphs100 runs/glyphs100 --data tensors:glyphs100.safetensors
#   LOSSES="cross-entropy kd dkd cakd-logits" \
#       bash recipes/evidence/compare.sh several-digits runs/several --data tensors:several-digits.safetensors
#
# LOSSES says which, SEEDS="0 1 2" which seeds, JOBS=4 how many students train at a time. Killed, it goes on where it
# was.
set -euo pipefail
name=$1 out=$2
shift 2
here=$(dirname "$0")
cakd train-teacher "evidence/$name-teacher" "$@" --out "$out/teacher" --resume -q
student() {
    loss=$1 seed=$2 name=$3 out=$4
    shift 4
    cakd distill "evidence/$name-student" "$@" --teacher "$out/teacher" --loss "$loss" --seed "$seed" \
        --out "$out/$loss-$seed" --resume -q
    cakd eval "$out/$loss-$seed" --teacher "$out/teacher" --json > "$out/$loss-$seed.json"
}
export -f student
LOSSES=${LOSSES:-cross-entropy kd dkd cakd}
for seed in ${SEEDS:-0 1 2}; do
    for loss in $LOSSES; do
        printf '%s\0' "$loss $seed"
    done
done | xargs -0 -P "${JOBS:-1}" -I{} bash -euc 'student $1 "${@:2}"' student {} "$name" "$out" "$@"
cakd export "$out/${LOSSES##* }-0" --format onnx
python3 "$here/summary.py" "$out" $LOSSES
