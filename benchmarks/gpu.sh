#!/bin/sh
# What only a GPU can show, in under eight minutes: sh benchmarks/gpu.sh [FOLDER for the tables, default .]
# Times of steps against a plain loop (fp32, TF32, bfloat16, compiled), reads of the device, cost of the guard, and faults
# of a run on the device with their analysis. Every part runs on a CPU too, only slower.
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-python}
$python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'

part() { # name, command...
    echo "== $1"
    name=$1
    shift
    "$@" > "$out/$name.txt" 2>&1 && tail -n 12 "$out/$name.txt" || { echo "failed, see $out/$name.txt"; failed=1; }
}

failed=0
variants=plain,ours,ours:nan_check=now,ours:float32_matmul=high,ours:mixedprec=true,ours:mixedprec=true+compile_model=on
variants=$variants,ours:mixedprec=true+memory_format=channels_last
part steps $python benchmarks/train_step.py --rows "${ROWS:-256}" --rounds 3 --variants "$variants" \
    --models "${MODELS:-ECAPA_TDNN channels=1024,ResNet34 n_mels=80}" --json "$out/steps.json"
test -f data/demo/train_list.txt || $python make_demo_data.py --out data/demo > /dev/null
part reads $python benchmarks/device_reads.py
part guard $python benchmarks/bench_guard.py --config configs/demo.yaml --steps 20
part faults $python trainSpeakerNet.py --config configs/demo_nan.yaml --save_path "$out/faults" --mixedprec true
part analysis $python analyze_nan_debug.py "$out/faults/debug_nan"
exit $failed
