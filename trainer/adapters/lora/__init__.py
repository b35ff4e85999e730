"""LoRA in peft's format, with a forward and backward of our own."""
