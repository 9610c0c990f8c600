#!/usr/bin/env bash
# The search behind the defaults of cakd-features: three epochs each, one seed, judged on held-out images alone.
#
#   bash recipes/evidence/search.sh runs/search runs/glyphs100/teacher --data tensors:glyphs100.safetensors
#
# Killed, it goes on where it was.
set -euo pipefail
out=$1 teacher=$2
shift 2
try() {
    name=$1
    shift
    cakd distill --student resnet8 --teacher "$teacher" --loss cakd --resume -q --out "$out/$name" \
        schedule.warmup_epochs=1 engine.epochs=3 engine.batch_size=128 "$@" > "$out/$name.txt"
    python3 - "$out/$name/run.json" "$name" << 'EOF'
import json, sys
held = json.load(open(sys.argv[1]))["metrics"]["validation"]
print(f"| {sys.argv[2]} | {100 * held['top1']:.2f} | {held['nll']:.4f} |")
EOF
}
mkdir -p "$out"
try "no features" "$@" loss.2.weight=0
for weight in 1 5 20 60 200; do
    try "weight $weight" "$@" loss.2.weight=$weight loss.2.beta=1
done
try "weight 5, alpha 2" "$@" loss.2.weight=5 loss.2.alpha=2 loss.2.beta=1
try "weight 5, beta 2" "$@" loss.2.weight=5 loss.2.beta=2
try "weight 20, beta 2" "$@" loss.2.weight=20 loss.2.beta=2
try "weight 20, beta 8" "$@" loss.2.weight=20 loss.2.beta=8
try "weight 60, beta 2" "$@" loss.2.weight=60 loss.2.beta=2
try "weight 5, not standardised" "$@" loss.2.weight=5 loss.2.beta=1 loss.2.standardise=false
try "weight 5, mask activation" "$@" loss.2.weight=5 loss.2.beta=1 loss.2.mask=activation
