"""The ONNX frontend: nodes, functions, control flow and weights of a file as nodes of one graph."""
