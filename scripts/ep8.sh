#!/usr/bin/env bash
# Everything that the bench measures on one host with eight GPUs, in stages of at most eight minutes each.
#
#   scripts/ep8.sh                                 every stage; the same command goes on where it was stopped
#   scripts/ep8.sh --list                          the stages
#   scripts/ep8.sh --only cases-collective,start   these stages, or those whose names begin so
#   scripts/ep8.sh --device cpu --nproc 2          a trial without GPUs: tiny shapes, of which no time means anything
#
#   --nproc N       ranks, one for each GPU (8)
#   --out FOLDER    results (ep8-results, ep8-trial on the CPU)
#   --limit SECONDS time of a stage (480)
#
# Each stage leaves a folder with its log, its state and, for suites, results.jsonl and results.html. FOLDER/table.md has
# the states and figures of all stages. A stage that passed is not run again. PYTHON names the interpreter; without it
# it is .venv's, else python3. Exit code: 0 if every stage passed or was skipped, 75 if one ran out of time, else 1.
set -euo pipefail
self=$(realpath "$0")
cd "$(dirname "$self")/.."

fail() {
    echo "ep8.sh: $*" >&2
    exit 2
}

nproc=8 device=cuda out='' limit=480 only='' list='' stage=''
while (($#)); do
    case $1 in
        --list) list=1 ;;
        --nproc | --device | --out | --limit | --only | --stage) # the last is this script's own: run a stage here
            (($# > 1)) || fail "$1 needs a value; see the head of this file"
            declare "${1#--}=$2"
            shift
            ;;
        -h | --help)
            sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$self"
            exit 0
            ;;
        *) fail "$1: no such option; allowed are --list, --only, --nproc, --device, --out, --limit" ;;
    esac
    shift
done
[[ $nproc =~ ^[1-9][0-9]{0,2}$ ]] || fail "--nproc $nproc: allowed are integers from 1 to 999"
[[ $limit =~ ^[1-9][0-9]{0,4}$ ]] || fail "--limit $limit: allowed are seconds from 1 to 99999"

# Layer and sizes: DeepSeek-V3's with 32 experts a rank, or tiny ones on the CPU.
case $device in
    cuda)
        layer=(--device=cuda --model=deepseek-v3 --experts=triton "--num-experts=$((32 * nproc))")
        layer+=(--max-dispatch-tokens-per-rank=4096)
        dtypes=(bf16 fp8) tokens='16, 64, 128, 1024, 4096' some=128 iterations=50 repeats=2000 marginal=100
        bytes=(1024 4096)
        out=${out:-ep8-results}
        ;;
    cpu)
        layer=(--device=cpu --model=tiny --max-dispatch-tokens-per-rank=64)
        dtypes=(bf16) tokens='4, 16' some=16 iterations=3 repeats=3 marginal=3
        bytes=(16)
        out=${out:-ep8-trial}
        ;;
    *) fail "--device $device: allowed are cuda and cpu" ;;
esac
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
distbench=("$python" -m distbench)
torchrun=("$python" -m torch.distributed.run --standalone)
transports=(collective symmetric deepep)
sizes=()
for size in 2 4 8; do
    ((size > nproc)) || sizes+=("$size")
done

stages() {
    echo "doctor|what this host has"
    local transport size dtype number
    for transport in "${transports[@]}"; do
        echo "cases-$transport|the layer over $transport: decode and prefill, every payload, both kinds of inputs"
    done
    for transport in "${transports[@]}"; do
        echo "sweep-$transport|the layer over $transport at many limits, timed"
    done
    for dtype in "${dtypes[@]}"; do
        echo "graph-$dtype|the experts in CUDA graphs, $dtype, timed"
        echo "layer-$dtype|the whole layer in one CUDA graph over symmetric, $dtype"
    done
    echo "selftest|every fault once, and clean cases"
    echo "smoke|the suite smoke"
    for transport in limits routing uneven capacity; do
        echo "suite-$transport|the suite $transport"
    done
    echo "mutants|broken kernels, transports, cuts and combines"
    for number in 1 2 3 4 5; do
        echo "jitter-$number|$repeats repeats with jitter, seed $number"
    done
    echo "experts|the Triton experts against their limits and a peer, one GPU"
    echo "peers|the Triton experts beside those of vLLM, SGLang and DeepGEMM, as far as they are installed, one GPU"
    for size in "${sizes[@]}"; do
        echo "start-$size|one command against a bare torchrun, $size ranks"
        echo "marginal-$size|marginal cost of a case of a suite, $size ranks"
        echo "check-$size|share of the check in a case, $size ranks"
        for transport in collective symmetric; do
            echo "bytes-$size-$transport|$transport against a bare all_to_all, $size ranks"
        done
    done
}

selected() {
    local stage=$1 name names
    [[ $only ]] || return 0
    IFS=, read -ra names <<<"$only"
    for name in "${names[@]}"; do
        [[ $stage == "$name" || $stage == "$name"-* ]] && return 0
    done
    return 1
}

if [[ $list ]]; then
    while IFS='|' read -r stage text; do
        if selected "$stage"; then printf '%-22s %s\n' "$stage" "$text"; fi
    done < <(stages)
    exit 0
fi

# skip REASON: end a stage that this machine lacks a part of.
skip() {
    echo "skipped: $*"
    exit 77
}

has_transport() {
    local known
    known=$("${distbench[@]}" plugins)
    grep -Eq "^transport +$1 " <<<"$known" || skip "this distbench has no transport $1"
}

has_gpus() {
    [[ $device == cuda ]] || skip "needs GPUs"
}

# layer_of RANKS: keys of the layer for bench_check.py, whose receive buffer has 32768 rows on any number of ranks.
layer_of() {
    if [[ $device == cuda ]]; then
        echo "experts=triton num_experts=$((32 * $1)) tokens=512 max_dispatch_tokens_per_rank=$((32768 / $1))"
    else
        echo "model=tiny device=cpu tokens=16 max_dispatch_tokens_per_rank=64"
    fi
}

suite_of() {
    local dtype listed=''
    for dtype in "${dtypes[@]}"; do listed+="${listed:+, }\"$dtype\""; done
    cat <<TOML
[defaults]
transport = "$1"
[axes]
dispatch_dtype = [$listed]
tokens = [$tokens]
TOML
}

# run_stage STAGE: run it in this shell, which it may end.
run_stage() {
    local stage=$1 folder=$out/$1 rest size
    local results=("--nproc=$nproc" "--out=$folder")
    rest=${stage#*-}
    size=${rest%%-*}
    case $stage in
        doctor) "${distbench[@]}" doctor ;;
        cases-*)
            has_transport "$rest"
            suite_of "$rest" >"$folder/cases.toml"
            "${distbench[@]}" suite "$folder/cases.toml" "${results[@]}" "${layer[@]}"
            ;;
        sweep-*)
            has_transport "$rest"
            "${distbench[@]}" sweep "${results[@]}" "${layer[@]}" "--transport=$rest" "--tokens=$some" --limits=auto \
                "--iterations=$iterations"
            ;;
        graph-*)
            has_gpus
            "${distbench[@]}" run "${results[@]}" "${layer[@]}" "--dispatch-dtype=$rest" "--tokens=$some" \
                --limit=max-recv --graph "--iterations=$iterations"
            ;;
        layer-*)
            has_gpus
            "${distbench[@]}" run "${results[@]}" "${layer[@]}" "--dispatch-dtype=$rest" --tokens=16 --limit=max-recv \
                --transport=symmetric --graph=layer
            ;;
        selftest) "${distbench[@]}" selftest --quick --resume "${results[@]}" "${small[@]}" ;;
        smoke) "${distbench[@]}" suite smoke "${results[@]}" "${small[@]}" ;;
        suite-*) "${distbench[@]}" suite "$rest" "${results[@]}" "${small[@]}" ;;
        mutants)
            has_gpus
            "${distbench[@]}" mutants --resume "${results[@]}" "${small[@]}"
            ;;
        jitter-*)
            "${distbench[@]}" run "${results[@]}" "${layer[@]}" "--tokens=16" "--seed=$rest" "--repeats=$repeats" \
                --until-failure --jitter=0.2
            ;;
        experts)
            has_gpus
            "$python" scripts/bench_gpu.py "--json=$folder/experts.json"
            ;;
        peers)
            has_gpus
            "$python" scripts/bench_peers.py "--json=$folder/peers.json"
            ;;
        start-*)
            has_gpus
            "$python" scripts/bench_launch_gpu.py "--nproc=$size" "--json=$folder/start.json"
            ;;
        marginal-*)
            "$python" scripts/bench_suite.py "--nproc=$size" "--cases=$marginal" --launches=1 --numerics exact both
            ;;
        check-*)
            local numerics keys bad=0
            read -ra keys <<<"$(layer_of "$size")"
            for numerics in exact both; do
                "${torchrun[@]}" "--nproc-per-node=$size" scripts/bench_check.py "${keys[@]}" "numerics=$numerics" ||
                    bad=$?
            done
            return "$bad"
            ;;
        bytes-*)
            [[ ${rest#*-} == collective ]] || has_gpus
            "${torchrun[@]}" "--nproc-per-node=$size" scripts/bench_transport.py "--device=$device" \
                "--transport=${rest#*-}" --tokens "${bytes[@]}"
            ;;
        *) fail "stage $stage has no command" ;;
    esac
}

# Suites and faults bring shapes of their own.
small=("--device=$device")
if [[ $device == cuda ]]; then small+=(--experts=triton); fi

state_of() {
    case $1 in
        0) echo passed ;;
        77) echo skipped ;;
        75 | 124 | 130 | 137 | 143) echo stopped ;;
        1) echo failed ;;
        *) echo broken ;;
    esac
}

if [[ $stage ]]; then
    run_stage "$stage"
    exit 0
fi
mkdir -p "$out"
asked="--device $device --nproc $nproc"
if [[ -f $out/asked && $(<"$out/asked") != "$asked" ]]; then
    fail "--out $out has results of $(<"$out/asked"), not of $asked; name another folder"
fi
echo "$asked" >"$out/asked"
if [[ $device == cpu ]]; then
    echo "ep8.sh: a trial on the CPU with tiny shapes; its times mean nothing" | tee "$out/trial"
fi
count=0 worst=0
while IFS='|' read -r stage text; do
    selected "$stage" || continue
    count=$((count + 1))
    folder=$out/$stage
    mkdir -p "$folder"
    if [[ -f $folder/state ]] && grep -q '^passed ' "$folder/state"; then
        echo "ep8.sh: $stage: passed before"
        continue
    fi
    echo "ep8.sh: $stage: $text"
    began=$SECONDS code=0
    timeout --signal=TERM --kill-after=30 "$limit" "$BASH" "$self" --stage "$stage" --nproc "$nproc" \
        --device "$device" --out "$out" </dev/null >"$folder/log" 2>&1 || code=$?
    state=$(state_of "$code")
    echo "$state $((SECONDS - began)) $code $text" >"$folder/state"
    echo "ep8.sh: $stage: $state after $((SECONDS - began)) s, exit code $code, $(tail -n 1 "$folder/log")"
    if [[ -f $folder/results.jsonl ]]; then
        "${distbench[@]}" report "$folder" --report html >/dev/null 2>&1 || true
    fi
    case $state in
        passed | skipped) ;;
        stopped) ((worst == 1)) || worst=75 ;;
        *) worst=1 ;;
    esac
done < <(stages)
((count)) || fail "--only $only: no such stage; see --list"
"$python" scripts/ep8_table.py "$out" >"$out/table.md"
echo "ep8.sh: $count stages; table in $out/table.md"
exit "$worst"
