#!/bin/sh
# openai/gpt-oss-20b, one GPU of 80 GB: every stage in one go, one report at the end.
# Usage: sh examples/gpt-oss-20b.sh MODEL_DIR [WORKSPACE] [DOMAIN]
#   MODEL_DIR  a downloaded openai/gpt-oss-20b (its MXFP4 *.safetensors)
#   DOMAIN     what to learn: a JSONL or Parquet file, a folder of them, or a known name
# Not yet run on the real weights. A killed run goes on with the same line.
set -eu

model=${1:?usage: sh examples/gpt-oss-20b.sh MODEL_DIR [WORKSPACE] [DOMAIN]}
workspace=${2:-runs/gpt-oss-20b}
domain=${3:-nemotron-tool-calling}
size=20b
. "$(dirname "$0")/gpt-oss.sh"
