"""LiteRT (TensorFlow Lite) for phones, and the same file in TFLite Micro for microcontrollers."""
