"""quantize and dequantize."""
