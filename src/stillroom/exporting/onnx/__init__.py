"""ONNX: the graph, its int8 forms, and the runtimes that open it."""
