#!/usr/bin/env bash
# Proof and timings on a machine with a GPU and no network: bench/gpu_check.sh [OUTDIR]
# Needs PyTorch with CUDA, Triton and nvcc; pytest for the tests, diffusers for the tests of fuse().
# OUTDIR (bench/results/<GPU>) gets a log of every step and the benchmark's rows, written as they come.
# A step that fails does not stop the others; the exit code is then 1, and 2 without a GPU.
# DEVICE=cpu tries the script itself on a machine without one. PYTHON chooses the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
BUDGET=540 # seconds for everything

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ $DEVICE == cuda && -z $gpu ]]; then
    echo "No GPU: $PYTHON's PyTorch sees none on this machine (DEVICE=cpu tries the script without)."
    exit 2
fi
name=${gpu:-cpu}
out=${1:-bench/results/${name// /-}}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
failed=0

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

step() { # step NAME SECONDS COMMAND...
    local step=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS status
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
    step "bench-$1" 100 "$PYTHON" -m bench --device "$DEVICE" --json "$out/ops.jsonl" "${@:2}"
}

echo "== $(date -u +%FT%TZ) $name" >>"$out/steps.log"
command -v nvidia-smi >/dev/null && nvidia-smi >"$out/nvidia-smi.log"

cuda=auto
[[ $DEVICE == cuda ]] && cuda=1
step build 150 env TBCM_BUILD_CPU=1 TBCM_BUILD_CUDA=$cuda "$PYTHON" setup.py build_ext --inplace --force
step versions 60 "$PYTHON" -m tbcm_kernels
[[ $DEVICE == cuda ]] &&
    step proofs-cuda 60 "$PYTHON" -m tbcm_kernels.testing --impl cuda --record "$out/proofs.jsonl"
step proofs 100 "$PYTHON" -m tbcm_kernels.testing
if has pytest; then
    pytest=("$PYTHON" -m pytest -p no:cacheprovider)
    step tests-attention 120 env TBCM_TEST_DEVICE="$DEVICE" "${pytest[@]}" tests/test_attention*.py
    step tests-kernels 120 "${pytest[@]}" tests/test_kernels.py
    step tests-silence 90 env TBCM_TEST_DEVICE="$DEVICE" "${pytest[@]}" tests/test_silence.py
    if has diffusers; then
        step tests-fuse 90 env TBCM_TEST_DEVICE="$DEVICE" "${pytest[@]}" tests/test_fuse.py tests/test_sana_training.py
    else
        skip tests-fuse "no diffusers"
    fi
else
    skip tests "no pytest"
fi

if [[ $DEVICE == cuda ]]; then
    bench attention --op attention --shape sd3-1024 --shape flux-1024 --shape sana-0.6b-1024
    bench adaln-0.6b --op adaln --shape sana-0.6b-1024
    bench linear_attention --op linear_attention --shape sana-0.6b-1024 --shape sana-1.6b-1024
    bench conv_glu --op conv_glu --shape sana-0.6b-1024 --shape sana-1.6b-1024
    bench rms_norm-0.6b --op rms_norm --shape sana-0.6b-1024
    bench adaln-1.6b --op adaln --op rms_norm --shape sana-1.6b-1024
    bench linear --op linear --shape sana-0.6b-1024 --shape sana-1.6b-1024
    bench attention-1.6b --op attention --shape sana-1.6b-1024 --shape dit-xl-512
    bench 512 --shape sana-0.6b-512
    bench compiled --op adaln --op rms_norm --shape sana-0.6b-1024 --compile
    big=(--layers 28 --batch 15 --dtype bfloat16 --seconds 20)
    has diffusers && step bench-model 150 "$PYTHON" -m bench.model "${big[@]}" --json "$out/model.jsonl"
fi
bench digits --shape digits
if has diffusers; then
    code="import tbcm.step_bench as b; print(b.bench_step('$out/step.json'))"
    step bench-step 120 "$PYTHON" -c "$code"
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
