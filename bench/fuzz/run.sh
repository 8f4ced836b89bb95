#!/usr/bin/env bash
# Fuzzes what decodes bytes from disk, other processes and the wire, and what decides by them: libFuzzer on stable Rust.
#
#   bench/fuzz/run.sh [--seconds N] [TARGET...]     N seconds (60) of each target (all); one line a target
#
# Exits with 1 if a target crashed, took more than the memory or time below, or if the canary was not found. The input then
# lies beside the corpus and is tried first next time; `<program> <input>` shows it again.
# Needs a C++ compiler: installs g++ where it may, else skips.
set -uo pipefail
cd "$(dirname "$0")" || exit 2

readonly RSS_MB=1024 INPUT_BYTES=4096 ONE_INPUT_SECONDS=10 CANARY_SECONDS=30

seconds=60
targets=()
while [ $# -gt 0 ]; do
    case "$1" in
    --seconds) seconds=${2:?--seconds needs a number}; shift 2 ;;
    -*) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) targets+=("$1"); shift ;;
    esac
done
if [ ${#targets[@]} -eq 0 ]; then
    for source in src/bin/*.rs; do
        name=$(basename "$source" .rs)
        [ "$name" = seeds ] || targets+=("$name")
    done
fi

if ! command -v c++ >/dev/null; then
    install=(apt-get install -y -qq g++)
    if [ "$(id -u)" -ne 0 ] || ! { apt-get update -qq && "${install[@]}"; } >/dev/null 2>&1; then
        echo "SKIPPED: fuzz: libFuzzer is C++, and there is no C++ compiler (apt-get install g++)"
        exit 0
    fi
fi

# What cargo-fuzz sets on nightly, with flags that stable has; sanitizers are nightly's, so memory errors in `unsafe` are not seen.
host=$(rustc -vV | sed -n 's/^host: //p')
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
flags+=" -Cllvm-args=-sanitizer-coverage-trace-compares"
TMPDIR=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d) # targets that need files write them here, over and over
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
out=${CARGO_TARGET_DIR:-$(cd ../.. && pwd)/target}/fuzz
# with --target the flags are the targets' alone, not those of build scripts and macros
RUSTFLAGS=$flags cargo build --release --locked --target "$host" --target-dir "$out" --bins || exit 2
programs=$out/$host/release
"$programs/seeds" "$out/seeds" || exit 2

last() { # pattern, log: the last match's number
    grep -oE "$1 *[0-9]+" "$2" | tail -n 1 | grep -oE '[0-9]+$' || echo 0
}

fuzz() { # target, seconds: its exit status; the log beside the corpus
    local corpus=$out/corpus/$1 seeds=$out/seeds/$1 crashes=$out/crashes/$1
    mkdir -p "$corpus" "$seeds" "$crashes"
    # what crashed once is tried first, so that it is found until it is mended
    "$programs/$1" "$corpus" "$seeds" "$crashes" -max_total_time="$2" -rss_limit_mb=$RSS_MB \
        -max_len=$INPUT_BYTES -timeout=$ONE_INPUT_SECONDS -print_final_stats=1 -artifact_prefix="$crashes/" \
        >"$out/$1.log" 2>&1
}

failed=0
printf '%-16s %12s %9s %9s %8s  %s\n' target executions exec/s coverage seconds outcome
for target in "${targets[@]}"; do
    began=$SECONDS outcome=ok log=$out/$target.log
    if [ "$target" = canary ]; then
        rm -rf "$out/corpus/canary" "$out/crashes/canary" # what it found before is not found again
        if fuzz canary $CANARY_SECONDS || ! grep -q 'the canary sings' "$log"; then
            outcome="NOT FOUND: coverage or comparisons are not seen" failed=1
        else
            outcome="ok: found, as it must be"
        fi
    elif ! fuzz "$target" "$seconds"; then
        outcome="CRASH: $(grep -m 1 -E "panicked at|ERROR: libFuzzer" "$log"); $(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)"
        failed=1
    fi
    printf '%-16s %12s %9s %9s %8s  %s\n' "$target" "$(last 'stat::number_of_executed_units:' "$log")" \
        "$(last 'stat::average_exec_per_sec:' "$log")" "$(last 'cov:' "$log")" $((SECONDS - began)) "$outcome"
done
exit $failed
