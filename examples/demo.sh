#!/bin/sh
# Every stage of nexus on the embedded model. Copy it, put your own names in, and it is a recipe.
# Usage: sh examples/demo.sh [WORKSPACE]     A second run skips what is up to date.
set -eu

run="--workspace ${1:-runs/demo} --config $(dirname "$0")/../configs/demo.yaml"

step() { printf '\n== nexus %s\n' "$*" >&2; nexus "$@"; }

step collect $run         # which experts the router picks, on text that covers the vocabulary
step pca $run             # which of them the shared expert should start from
step convert $run         # the original's shards, linked, and one new shard beside them
step train $run           # learn the domain; the model without its shared experts is the teacher
step precompute $run      # or: store the teacher's view once ...
step train-offline $run --set max_steps=null   # ... and train on it once, with no teacher in memory
step validate $run --model "${1:-runs/demo}/train"   # learned the domain? lost anything?
step plot $run            # figures, and one page with everything: plot/report.html
