#!/bin/sh
# openai/gpt-oss-120b, one GPU of 141 GB, or 80 GB with a narrower shared expert: every stage in one go, one report at the end.
# Usage: sh examples/gpt-oss-120b.sh MODEL_DIR [WORKSPACE] [DOMAIN]
#   MODEL_DIR  a downloaded openai/gpt-oss-120b (its MXFP4 *.safetensors)
#   DOMAIN     what to learn: a JSONL or Parquet file, a folder of them, or a known name
# Not yet run on the real weights. A killed run goes on with the same line.
set -eu

model=${1:?usage: sh examples/gpt-oss-120b.sh MODEL_DIR [WORKSPACE] [DOMAIN]}
workspace=${2:-runs/gpt-oss-120b}
domain=${3:-nemotron-tool-calling}
size=120b
. "$(dirname "$0")/gpt-oss.sh"
