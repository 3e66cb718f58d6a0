"""A transformers model run over trees of candidates: forward, KV cache, attention, CUDA graphs."""
