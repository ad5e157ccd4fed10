"""GGUF for llama.cpp: weights, tokenizer, and the runtime that opens it."""
