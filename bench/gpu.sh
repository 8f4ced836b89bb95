#!/usr/bin/env bash
# All that has to be seen on a GPU, in one call of less than ten minutes: the device's facts, `kvd check`, the tiers' tests on it, `bench gpu`, a model in PyTorch, compute-sanitizer.
#
#   bench/gpu.sh prepare DIR [--debug]   with the network: builds what is needed, without debug symbols, into DIR (some 30 MB)
#   bench/gpu.sh run DIR [OUT]           on the machine with the GPU, without a network or root: everything, the table last; OUT: DIR/out
#   bench/gpu.sh dry DIR [OUT]           the same with the stand-in, wherever a step can do without a GPU: tries the script out
#
# The machine that runs needs bash, coreutils, tar, gzip, and a C library at least as new as the one that prepared; for the model a python3 with torch and transformers; for
# compute-sanitizer CUDA's tools. What is missing is a step that says SKIPPED. Each step has a limit of time, and all of them together have one; a step that fails stops none after it.
# OUT gets few files, named by device, driver and day: what `bench gpu` and the model printed and the steps as JSON lines, the table, and all logs in one archive. Copy the JSON to bench/results/.
# Nothing else is touched, but for the folder that the tests were built to put their files into (made where it is missing, and removed again), and one in the system's temporary folder
# where OUT's path is too long for a socket's.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

# Seconds: a call is to end within ten minutes.
readonly total_s=570
# Of pages as `bench gpu` has them.
readonly blocks=1,32,256 bench_s=75 kills=10
# What a driver may keep after all of it, MiB.
readonly leak_mib=64

usage() {
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
}

# ---- prepare ----

prepare() { # DIR [--debug]
    local profile=release flags=(--release)
    if [ "${2:-}" = --debug ]; then profile=debug flags=(); fi
    mkdir -p "$1" || exit 2
    local dir target
    dir=$(cd "$1" && pwd)
    target=${CARGO_TARGET_DIR:-$root/target}
    stage=$(mktemp -d) || exit 2
    trap 'rm -rf "$stage"' EXIT
    mkdir "$stage/bin" "$stage/wheel"
    cd "$root" || exit 2
    cargo build --locked "${flags[@]}" -p kvd -p bench --bins || exit 1
    cp "$target/$profile/kvd" "$target/$profile/bench" "$stage/bin/" || exit 1
    local suite found built
    built=$(cargo test --locked "${flags[@]}" -p kvd-tiers --no-run --test conformance --test gpu --test gpu_kernels --test gpu_transfer --test hbm 2>&1) || {
        echo "$built"
        exit 1
    }
    for suite in conformance gpu gpu_kernels gpu_transfer hbm; do
        found=$(sed -nE "s|^ *Executable tests/$suite.rs \((.*)\)$|\1|p" <<<"$built")
        cp "$found" "$stage/bin/$suite" || exit 1
    done
    strip "$stage"/bin/*
    wheel "$target" "$stage/wheel" "${flags[@]}"
    {
        echo "commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo +)"
        echo "profile=$profile"
        echo "tests_folder=$target/tmp"
    } >"$stage/facts"
    tar -C "$stage" -czf "$dir/kvd-gpu.tgz" . || exit 1
    ls -lh "$dir/kvd-gpu.tgz"
}

# The Python package, by the tools that its own tests use. Without them the model is skipped later.
wheel() { # target, folder, flags of cargo
    local target=$1 folder=$2 tools=$1/python/home
    shift 2
    if ! client/python/test.sh home; then
        echo "SKIPPED: no Python package: the model will not run"
        return
    fi
    (cd client/python && CARGO_TARGET_DIR=$target "$tools/bin/maturin" build --locked "$@" --out "$folder") ||
        echo "SKIPPED: the Python package does not build: the model will not run"
}

# ---- run ----

began=$SECONDS
steps=0 failed=0
left_s() { echo $((total_s - (SECONDS - began))); }

# A line of the table, and of the JSON.
record() { # step, result, seconds, what
    steps=$((steps + 1))
    case $2 in FAILED*) failed=$((failed + 1)) ;; esac
    printf '%-22s %-9s %8s  %s\n' "$1" "$2" "$3" "$4" >>"$work/table"
    printf '{"step":"%s","result":"%s","seconds":%s,"what":"%s"}\n' "$1" "$2" "$3" "$(printf %s "$4" | tr -d '\\"\000-\037')" >>"$work/steps"
    echo "== $1: $2 in $3 s: $4"
}

# Runs a command with a limit of time, its output in a log; then `what_...` says in a line what came of it, or nothing, and may turn a success into something else.
step() { # name, seconds at most, function that looks at the log, command...
    local name=$1 most=$2 look=$3 left start=$SECONDS status result what
    shift 3
    left=$(left_s)
    if [ "$left" -lt 5 ]; then
        record "$name" "no time" 0 "the call's $total_s seconds are over"
        return
    fi
    if [ "$most" -gt "$left" ]; then most=$left; fi
    log=$logs/$name.log
    echo "== $name: $*" | cut -c1-200
    timeout --kill-after=5 "$most" "$@" >"$log" 2>&1
    status=$?
    result=ok
    what=''
    case $status in
    124 | 137) result=FAILED what="more than $most s" ;;
    *) $look "$status" ;;
    esac
    record "$name" "$result" $((SECONDS - start)) "$what"
}

skip() { # step, why
    record "$1" SKIPPED 0 "$2"
}

# What they look at: `log`, `result` and `what` are the step's.
# shellcheck disable=SC2034
look_check() { # 2: something is not there, which is said
    what=$(sed -nE 's/^(ok|without|FAILED) +gpu +/\1: /p' "$log" | head -n 1 | cut -c1-140)
    case $1 in 0 | 2) ;; *) result=FAILED ;; esac
    case $mode:$what in run:ok*) ;; run:*) result=FAILED ;; esac
}

# Passed, failed, and whether they have seen the device: a suite that asked only the stand-in has shown nothing here.
look_tests() {
    local passed bad skipped
    passed=$(sed -nE 's/^test result: .* ([0-9]+) passed; .*/\1/p' "$log" | tail -n 1)
    bad=$(sed -nE 's/^test result: .* ([0-9]+) failed; .*/\1/p' "$log" | tail -n 1)
    skipped=$(grep -cE '(^|\.\.\. )SKIPPED: ' "$log")
    what="${passed:-no} passed, ${bad:-?} failed, $skipped skipped, on $kind"
    [ "$1" = 0 ] && [ "${passed:-0}" -gt 0 ] || result=FAILED
    if ! grep -qE "(^|\.\.\. )$kind(:|$)" "$log"; then
        result=FAILED
        what="$what: NOT ASKED OF IT (${passed:-no} passed elsewhere)"
    fi
}

# Cases of the kernels' source on the processor: no device is asked.
look_host_tests() {
    what=$(sed -nE 's/^test result: .* ([0-9]+ passed; [0-9]+ failed).*/\1/p' "$log" | tail -n 1)", on the processor"
    [ "$1" = 0 ] || result=FAILED
}

look_sanitizer() {
    look_tests "$1"
    local found
    found=$(grep -E '^========= (ERROR|RACECHECK) SUMMARY' "$log" | tail -n 1 | sed 's/^=* *//')
    what="${found:-no summary}; $what"
    [ -n "$found" ] && grep -qE ' 0 (errors|hazards)' <<<"$found" || result=FAILED
}

look_bench() {
    if grep -q '"skipped":"SKIPPED' "$log" && ! grep -q '"case":"bars"' "$log"; then
        result=SKIPPED
        what=$(field_of skipped "$log")
        return
    fi
    grep '^{' "$log" >"$out/${slug}_bench.jsonl"
    what="$(grep -c '"met":true' "$log") bars met, $(grep -c '"met":false' "$log") missed"
    [ "$1" = 0 ] || { result=FAILED what="$what; $(tail -n 1 "$log" | cut -c1-160)"; }
}

look_torch() {
    grep '^{' "$log" >"$out/${slug}_torch.jsonl"
    local line
    while read -r line; do
        what+="$(field_of tokens <<<"$line") tokens $(number_of cold_s 4 "$line") s cold, $(number_of loaded_s 4 "$line") loaded; "
    done < <(grep '"loaded_s"' "$log" | sort -u)
    what+="break-even $(field_of break_even_tokens "$log"); $(grep -c '"identical": *true' "$log") identical, $(grep -c '"identical": *false' "$log") not"
    if grep -q '"SKIPPED"' "$log"; then
        result=SKIPPED
        what=$(field_of why "$log")
        rm -f "$out/${slug}_torch.jsonl"
    fi
    [ "$1" = 0 ] || { result=FAILED what="$what; $(tail -n 1 "$log" | cut -c1-160)"; }
}

# The last value of a field, in JSON lines of a file or of stdin.
field_of() { # name, [file]
    sed -nE "s/.*\"$1\": *\"?([^,\"}]*).*/\1/p" "${2:--}" | tail -n 1
}

# A number of a field, to so many digits.
number_of() { # name, digits, line
    printf "%.$2f" "$(field_of "$1" <<<"$3")" 2>/dev/null
}

gpu_query() { # what
    nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null | head -n 1
}

facts() {
    cat "$work/facts"
    date -u +%Y-%m-%dT%H:%MZ
    uname -srm
    grep -m 1 'model name' /proc/cpuinfo
    grep MemTotal /proc/meminfo
    ldd --version 2>&1 | head -n 1
    nvidia-smi || true
    nvidia-smi -q -d PERFORMANCE,CLOCK,PCIE 2>/dev/null | head -n 120
    lspci 2>/dev/null | grep -i nvidia
    ls -l /dev/nvidia* 2>/dev/null
    ulimit -a
    echo "$slug"
}

# A suite on the device; further words are cargo's test harness's.
suite() { # name, seconds, binary, words
    local name=$1 most=$2 binary=$3
    shift 3
    step "$name" "$most" look_tests "$bin/$binary" --nocapture "$@"
}

suites() {
    suite device 80 gpu
    suite medium 40 hbm
    suite conformance 40 conformance
    suite transfers 80 gpu_transfer
}

# Whatever is called ten_thousand_...: on the device where a suite has one, the kernels' source on the processor in any case.
ten_thousand() {
    local binary any=false
    for binary in gpu gpu_transfer; do
        if "$bin/$binary" --list --ignored 2>/dev/null | grep -q 'ten_thousand_'; then
            any=true
            suite "ten-thousand-$binary" 120 "$binary" --ignored ten_thousand_
        fi
    done
    $any || skip ten-thousand "no suite has such cases for a device"
    if command -v cc >/dev/null; then
        step ten-thousand-source 60 look_host_tests "$bin/gpu_kernels" --ignored ten_thousand_
    else
        skip ten-thousand-source "no C compiler"
    fi
}

sanitizer() {
    local tool found folder
    found=$(command -v compute-sanitizer)
    for folder in /usr/local/cuda/bin /opt/nvidia/cuda/bin /usr/local/cuda/compute-sanitizer; do
        if [ -z "$found" ] && [ -x "$folder/compute-sanitizer" ]; then found=$folder/compute-sanitizer; fi
    done
    if [ "$mode" = dry ] || [ -z "$found" ]; then
        skip sanitizer "$([ "$mode" = dry ] && echo "no device is asked" || echo "no compute-sanitizer on this machine")"
        return
    fi
    for tool in memcheck racecheck synccheck; do
        step "$tool-kernels" 60 look_sanitizer "$found" --tool "$tool" --error-exitcode 9 "$bin/gpu" --nocapture kernels::
    done
    # few cases: under it, each takes many times as long
    step memcheck-transfers 60 look_sanitizer "$found" --tool memcheck --error-exitcode 9 "$bin/gpu_transfer" --nocapture chunks_of_one_part
}

bench() {
    local words=(--device cuda --blocks "$blocks" --seconds "$bench_s" --kills "$kills")
    if [ "$mode" = dry ]; then words=(--device software --blocks '1,2' --seconds 2 --kills 2); fi
    step bench 240 look_bench "$bin/bench" gpu "${words[@]}" --output json
}

# A model, beside a daemon of its own.
torch() {
    local script=$root/client/python/tests/pytorch/gpu.py wheel device=(--device cuda) gib=8 socket=$work/kvd/kvd.sock
    wheel=$(find "$work/wheel" -name '*.whl' | head -n 1)
    if [ "$mode" = dry ]; then device=(--device cpu --tokens '512,1024') gib=1; fi
    if [ ! -e "$script" ]; then
        skip torch "client/python/tests/pytorch/gpu.py is not there"
    elif [ -z "$wheel" ]; then
        skip torch "no Python package was prepared"
    elif ! python3 -c 'import torch, transformers' >"$logs/torch-import.log" 2>&1; then
        skip torch "$(tail -n 1 "$logs/torch-import.log")"
    elif ! python3 -m zipfile -e "$wheel" "$work/site"; then
        skip torch "the Python package cannot be unpacked"
    else
        mkdir "$work/kvd"
        printf 'data_dir = "%s"\n[listen]\ngrpc_address = ""\nmetrics_address = ""\n[hbm]\ndevice = "%s"\n[dram]\ncapacity_bytes = "%sGiB"\nkeep_ms = 0\n[nvme]\npath = ""\n' \
            "$work/kvd" "$of_daemon" "$gib" >"$work/kvd.toml"
        "$bin/kvd" serve --config "$work/kvd.toml" >"$logs/torch-daemon.log" 2>&1 &
        daemon=$!
        local tries
        for ((tries = 0; tries < 200; tries++)); do
            if [ -S "$socket" ]; then break; fi
            sleep 0.1
        done
        PYTHONPATH=$work/site step torch 150 look_torch python3 "$script" --socket "$socket" --output json "${device[@]}"
        if kill "$daemon" 2>/dev/null; then
            wait "$daemon"
        else
            record torch-daemon FAILED 0 "it ended by itself: $(tail -n 1 "$logs/torch-daemon.log" | cut -c1-120)"
        fi
        daemon=''
    fi
}

memory_after() { # MiB before
    local now tries
    if [ -z "$1" ]; then
        skip memory-after "no nvidia-smi"
        return
    fi
    for ((tries = 0; tries < 20; tries++)); do
        now=$(gpu_query memory.used)
        if [ "${now:-999999}" -le $(($1 + leak_mib)) ]; then break; fi
        sleep 0.5
    done
    record memory-after "$([ "${now:-999999}" -le $(($1 + leak_mib)) ] && echo ok || echo FAILED)" $((tries / 2)) "$1 MiB of device memory in use before, $now after"
}

# The bars, one a line where they were missed.
bars() {
    local file=$out/${slug}_bench.jsonl
    if [ ! -s "$file" ]; then
        echo "bars: nothing was measured"
        return
    fi
    echo "bars: $(grep -c '"met":true' "$file") met, $(grep -c '"met":false' "$file") missed"
    local line
    while read -r line; do
        case $line in *'"ratio":'*) ;; *) echo "  missed: $(field_of case <<<"$line")" && continue ;; esac
        echo "  missed: $(field_of case <<<"$line") $(field_of pages <<<"$line") $(field_of batch <<<"$line") blocks: $(number_of ratio 3 "$line") of $(field_of bar <<<"$line")"
    done < <(grep '"met":false' "$file")
    # of 256 blocks, as that is what a prompt of 4096 tokens is
    while read -r line; do
        printf '  %-12s %-7s %3s blocks %8s GB/s, %5s of the plain copy\n' "$(field_of case <<<"$line")" "$(field_of pages <<<"$line")" \
            "$(field_of batch <<<"$line")" "$(number_of gbps 2 "$line")" "$(number_of ratio 3 "$line")"
    done < <(grep -E '"case":"(load|store|kept_load|kept_store|node_load|node_store)"' "$file" | grep "\"batch\":${blocks##*,},")
}

# Ends the daemon, if one still runs, and what the tests were given.
clean() {
    if [ -n "$daemon" ]; then kill "$daemon" 2>/dev/null; fi
    if $made_folder; then rmdir -p "$tests_folder" 2>/dev/null; fi
    rm -rf "$work"
}

run() { # DIR [OUT]
    local packed before
    packed=$(cd "$1" 2>/dev/null && pwd)/kvd-gpu.tgz
    if [ ! -e "$packed" ]; then
        echo "no kvd-gpu.tgz in $1: bench/gpu.sh prepare $1"
        exit 2
    fi
    out=${2:-$1/out}
    mkdir -p "$out" || exit 2
    out=$(cd "$out" && pwd)
    # a socket's path has at most 107 bytes
    work=$out/work daemon='' made_folder=false tests_folder=''
    rm -rf "$work"
    if [ ${#work} -gt 50 ]; then work=$(mktemp -d); else mkdir "$work" || exit 2; fi
    trap clean EXIT
    trap 'exit 130' INT TERM
    logs=$work/logs bin=$work/bin
    mkdir "$logs" "$work/tmp"
    tar -C "$work" -xzf "$packed" || exit 2
    tests_folder=$(sed -n 's/^tests_folder=//p' "$work/facts")
    if [ ! -d "$tests_folder" ] && mkdir -p "$tests_folder" 2>/dev/null; then made_folder=true; fi
    export TMPDIR=$work/tmp HOME=$work CUDA_CACHE_PATH=$work/cuda PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
    kind=cuda of_daemon=auto
    if [ "$mode" = dry ]; then kind=software of_daemon=software; fi
    local name driver
    name=$(gpu_query name) driver=$(gpu_query driver_version)
    if [ "$mode" = dry ]; then name=stand-in driver=none; fi
    slug=$(printf '%s_%s_%s' "${name:-no-gpu}" "${driver:-none}" "$(date -u +%F)" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9._-')
    before=$(gpu_query memory.used)
    printf '%-22s %-9s %8s  %s\n' step result seconds what >"$work/table"
    facts >"$logs/facts.log" 2>&1
    record facts ok $((SECONDS - began)) "${name:-no GPU}, driver ${driver:-none}, $(uname -r), $(nproc) cores"
    printf 'data_dir = "%s"\n[hbm]\ndevice = "%s"\n[nvme]\npath = ""\n' "$work/check" "$of_daemon" >"$work/check.toml"
    mkdir "$work/check"
    step check 20 look_check "$bin/kvd" check --config "$work/check.toml"
    suites
    bench
    torch
    sanitizer
    ten_thousand
    memory_after "$before"
    finish
}

finish() {
    sed "s/^{/{\"machine\":\"$slug\",\"mode\":\"$mode\",/" "$work/steps" >"$out/${slug}_steps.jsonl"
    tar -C "$work" -czf "$out/${slug}_logs.tgz" logs
    {
        echo "$slug, $(grep commit= "$work/facts"), $(grep profile= "$work/facts"), $mode, $((SECONDS - began)) s"
        bars
        cat "$work/table"
        echo "$steps steps, $failed failed"
    } >"$out/${slug}_table.txt"
    echo
    cat "$out/${slug}_table.txt"
    [ "$failed" = 0 ]
}

mode=${1:-}
[ $# -ge 2 ] || usage
shift
case $mode in
prepare) prepare "$@" ;;
run | dry) run "$@" ;;
*) usage ;;
esac
