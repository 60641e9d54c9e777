# Sourced by gpt-oss-20b.sh and gpt-oss-120b.sh, which set model, workspace, domain and size.

run="--workspace $workspace --config $(dirname "$0")/../configs/gpt-oss-$size.yaml"
general=${GENERAL:-nemotron-general}
text="$domain:0.6,$general:0.4"

step() { printf '\n== nexus %s\n' "$*" >&2; nexus "$@"; }

step collect $run --model "$model" --data "$text"
step pca $run
step convert $run --input "$model"
step train $run --data "$text" --dry-run   # steps, tokens, memory: stops here if it does not fit
step train $run --data "$text"
step validate $run --data "$domain" --general-data "$general" --max-degradation 1.0
step plot $run
