"""ExecuTorch, PyTorch's own runtime for phones: lowered to XNNPACK."""
