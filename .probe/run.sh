export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1
mkdir -p /tmp/big
(
 start=$SECONDS
 OMP_NUM_THREADS=12 timeout 500 python3 benchmarks/big_decoder.py --layers 8 --folder /tmp/big > $OUT/big8.log 2>&1
 T=$((SECONDS-start)); echo "took $T" >> $OUT/big8.log
 if (( 4*T < 520-SECONDS )); then OMP_NUM_THREADS=14 timeout $((530-SECONDS)) python3 benchmarks/big_decoder.py --layers 32 --folder /tmp/big > $OUT/big32.log 2>&1; fi
) &
python3 -m pytest -q tests/test_cuda.py --tb=short --show-capture=no > $OUT/cuda.log 2>&1; tail -40 $OUT/cuda.log
OMP_NUM_THREADS=2 timeout 240 python3 benchmarks/sparse_24_gpu.py > $OUT/sparse.log 2>&1; cat $OUT/sparse.log | tail -60
python3 -m pytest -q "tests/frontends/test_capture.py" tests/passes/simplify/test_assemble_attention.py -k "unregistered or rows_without" --tb=long --show-capture=no > $OUT/two.log 2>&1; tail -5 $OUT/two.log
OMP_NUM_THREADS=1 timeout $((480-SECONDS)) python3 -m pytest -q -n 4 --dist loadfile --show-capture=no --tb=short tests/passes/training tests/passes/elastic tests/passes/sparsity tests/passes/depth tests/passes/calibration tests/passes/allocation tests/passes/test_*.py > $OUT/suite.log 2>&1; tail -20 $OUT/suite.log | cut -c1-200
wait
cat $OUT/big8.log; cat $OUT/big32.log 2>/dev/null
