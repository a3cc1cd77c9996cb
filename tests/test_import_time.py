"""`import regauge` stays fast: what is heavy, or may be missing, loads on first use."""

import json
import subprocess
import sys

LOADED_ON_USE = {"onnx", "onnxruntime", "triton", "sklearn", "matplotlib", "timm"}
PRINT_MODULES = "import json, sys, regauge; print(json.dumps(sorted(sys.modules)))"


def test_heavy_libraries_load_on_use() -> None:
    done = subprocess.run([sys.executable, "-c", PRINT_MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "regauge" in loaded
    assert loaded & LOADED_ON_USE == set()
