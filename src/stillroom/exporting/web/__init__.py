"""The browser: a page with the ONNX file and its runtime, fetched once, and a browser without a window that runs it."""
