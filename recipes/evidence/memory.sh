#!/usr/bin/env bash
# Does a teacher memory change anything but time? The same students with the teacher live and with a memory on disk.
#
#   bash recipes/evidence/memory.sh fashion-mnist runs/memory runs/fashion-mnist/teacher --data-root FOLDER
#
# SEEDS="0 1 2" says which seeds. Runs in turns, one at a time, because the times are compared. Fresh each time.
set -euo pipefail
name=$1 out=$2 teacher=$3
shift 3
mkdir -p "$out"
export CAKD_HOME=$out/home
: > "$out/seconds.txt"
for seed in ${SEEDS:-0 1 2}; do
    for loss in kd dkd cakd; do
        for memory in off disk; do
            begin=$(date +%s.%N)
            cakd distill "evidence/$name-student" "$@" --teacher "$teacher" --loss "$loss" --seed "$seed" \
                engine.teacher_memory=$memory --out "$out/$memory/$loss-$seed" --overwrite -q
            echo "$memory $loss $seed $begin $(date +%s.%N)" >> "$out/seconds.txt"
        done
    done
done
cakd teacher-memory verify
python3 "$(dirname "$0")/memory.py" "$out"
