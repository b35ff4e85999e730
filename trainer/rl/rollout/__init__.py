"""Engines that generate: padded `generate`, continuous batching, vLLM over HTTP, behind one protocol."""
