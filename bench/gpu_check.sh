#!/usr/bin/env bash
# Proof and timings on a machine with a GPU and no network: bench/gpu_check.sh [OUTDIR]
# Needs PyTorch with CUDA, Triton, nvcc, setuptools and rich; pytest for the tests, diffusers for those of fuse(), .[train] for steps of whole models.
# OUTDIR (bench/results/NAME, the GPU's; rows elsewhere prove nothing) gets a log of every step and the benchmark's rows, written as they come.
# A step that fails does not stop the others; the exit code is then 1, and 2 without a GPU.
# DEVICE=cpu tries the script itself on a machine without one, with four times the time.
# PYTHON chooses the interpreter, BUDGET the seconds for everything (540).
set -u
out=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
slow=1
[[ $DEVICE == cpu ]] && slow=4
BUDGET=${BUDGET:-$((540 * slow))}

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ $DEVICE == cuda && -z $gpu ]]; then
    echo "No GPU: $PYTHON's PyTorch sees none on this machine (DEVICE=cpu tries the script without)."
    exit 2
fi
name=${gpu:-cpu}
out=${out:-bench/results/${name// /-}}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
failed=0

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

step() { # step NAME SECONDS COMMAND...
    local step=$1 limit=$(($2 * slow)) left=$((BUDGET - SECONDS)) start=$SECONDS status
    shift 2
    if ((left < 10)); then
        echo "not run  $step: the time is up" | tee -a "$out/steps.log"
        failed=1
        return
    fi
    timeout "$((limit < left ? limit : left))" "$@" >"$out/$step.log" 2>&1
    status=$?
    if ((status == 0)); then
        echo "passed   $step, $((SECONDS - start)) s" | tee -a "$out/steps.log"
    else
        failed=1
        echo "FAILED   $step, exit code $status: $out/$step.log ends" | tee -a "$out/steps.log"
        tail -n 5 "$out/$step.log"
    fi
}

skip() { echo "skipped  $1: $2" | tee -a "$out/steps.log"; }

bench() { # bench NAME ARGUMENTS...
    step "bench-$1" 100 "$PYTHON" -m bench --device "$DEVICE" --seconds 0.3 --json "$out/ops.jsonl" "${@:2}"
}

tbcm_step() { # tbcm_step MODEL STEPS [SIZES]: `tbcm bench step`, without the packages of its command line
    local code="from tbcm.step_bench import Plan, bench_step, lines
result = bench_step('$out/$1-step.json', $2, Plan('$1'${3:+, $3}))
print(*lines(result), sep='\n')"
    step "bench-step-$1" 120 "$PYTHON" -c "$code"
}

echo "== $(date -u +%FT%TZ) $name" >>"$out/steps.log"
command -v nvidia-smi >/dev/null && nvidia-smi >"$out/nvidia-smi.log"

cuda=auto
[[ $DEVICE == cuda ]] && cuda=1
step build 150 env TBCM_BUILD_CPU=1 TBCM_BUILD_CUDA=$cuda "$PYTHON" setup.py build_ext --inplace --force
step versions 60 "$PYTHON" -m tbcm_kernels

# Proofs and tests share the GPU and all cores; nothing is timed meanwhile.
jobs=$(($(nproc) > 8 ? $(nproc) - 6 : 1))
(
    if [[ $DEVICE == cuda ]]; then
        prove=("$PYTHON" -m tbcm_kernels.testing --device cuda --record "$out/proofs.jsonl")
        step proofs-cuda 100 "${prove[@]}" --impl cuda --jobs "$jobs"
        step proofs 200 "${prove[@]}" --impl triton --jobs "$jobs"
    else
        step proofs 100 "$PYTHON" -m tbcm_kernels.testing --jobs "$jobs"
    fi
    exit $failed
) &
proofs=$!
if has pytest; then
    pytest=("$PYTHON" -m pytest -p no:cacheprovider --tb=short --maxfail=6) # a stop shows why, a time-out does not
    has xdist && pytest+=(-n 4)
    step tests-silence 90 env TBCM_TEST_DEVICE="$DEVICE" "${pytest[@]}" tests/test_silence.py
    if has diffusers; then
        step tests-fuse 90 env TBCM_TEST_DEVICE="$DEVICE" "${pytest[@]}" tests/test_fuse.py tests/test_sana_training.py
        step tests-graph 40 "${pytest[@]}" tests/test_graphed.py
    else
        skip tests-fuse "no diffusers"
    fi
    step tests-attention 120 env TBCM_TEST_DEVICE="$DEVICE" "${pytest[@]}" tests/test_attention*.py
    step tests-kernels 120 "${pytest[@]}" tests/test_kernels.py
else
    skip tests "no pytest"
fi
wait $proofs || failed=1

if [[ $DEVICE == cuda ]]; then
    step proofs-table 30 "$PYTHON" -m bench.proofs # of bench/results: what follows takes the kernels proved there
    bench blocks --op adaln --op linear_attention+norm --op conv_glu --op rms_norm --shape sana-0.6b-1024
    if has diffusers; then
        tbcm_step sana-0.6b 8
        big=(--layers 28 --batch 15 --dtype bfloat16 --seconds 4)
        step bench-model 100 "$PYTHON" -m bench.model "${big[@]}" --json "$out/model.jsonl"
    fi
    bench attention --op attention --shape sd3-1024 --shape flux-1024 --shape sana-0.6b-1024
    bench blocks-1.6b --op adaln --op linear_attention+norm --op conv_glu --op rms_norm --shape sana-1.6b-1024
    bench objective --op tangent_loss --op flow_input --op flow_output --op trajectory_step --shape sana-0.6b-1024
    for tokens in 256 1024 4096 16384; do
        step "bench-length-$tokens" 40 "$PYTHON" -m bench --op attention --shape dit-b-512 --tokens "$tokens" \
            --pass forward --pass jvp --pass step --device cuda --seconds 0.3 --json "$out/length.jsonl"
    done
    bench linear --op linear --shape sana-0.6b-1024 --shape sana-1.6b-1024
    bench attention-others --op attention --shape sana-1.6b-1024 --shape dit-xl-512 --shape pixart-1024
    bench 512 --shape sana-0.6b-512
    bench compiled --op adaln --op rms_norm --shape sana-0.6b-1024 --compile
    others=(--layers 4 --side 64 --text 300 --dtype bfloat16 --seconds 3)
    has diffusers && step bench-others 120 "$PYTHON" -m bench.others "${others[@]}" --json "$out/others.jsonl"
    bench wan --op attention --shape wan-1.3b-480p --pass jvp --pass step
    has diffusers && tbcm_step sana-1.6b 8
fi
quick=()
[[ $DEVICE == cpu ]] && quick=(--op attention --op adaln --op tangent_loss --batch 1 --seconds 0) # to try the script
bench digits --shape digits "${quick[@]}"
if has diffusers; then
    tbcm_step digits 40
    if [[ $DEVICE == cpu ]]; then # the smallest of each
        tiny=(--layers 1 --latent 4 --text 8 --seconds 1 --device cpu)
        step bench-model 100 "$PYTHON" -m bench.model "${tiny[@]}" --json "$out/model.jsonl"
        tbcm_step sana-0.6b 2 "layers=1, resolution=64, route_steps=2"
    fi
    [[ -s $out/model.jsonl ]] && step cost 30 "$PYTHON" -m bench.cost "$out/model.jsonl"
else
    skip bench-step "no diffusers"
fi

if [[ $DEVICE == cuda ]] && sanitizer=$(command -v compute-sanitizer); then
    for tool in memcheck racecheck; do # without PyTorch's cache, every allocation has an end
        step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
            --error-exitcode 1 "$PYTHON" -m tbcm_kernels.testing --impl cuda --few
    done
else
    skip sanitizer "no GPU, or no compute-sanitizer"
fi

exit $failed
