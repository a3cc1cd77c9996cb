"""The ONNX backend: a graph as a file, or the file it came from, patched where it changed; proofs of both."""
