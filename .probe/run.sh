export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1
mkdir -p /tmp/big
( OMP_NUM_THREADS=14 timeout 320 python3 benchmarks/big_decoder.py --layers 16 --folder /tmp/big > $OUT/big16.log 2>&1 ) &
python3 -m pytest -q tests/test_cuda.py --tb=short --show-capture=no > $OUT/cuda.log 2>&1; tail -30 $OUT/cuda.log
wait
cat $OUT/big16.log
