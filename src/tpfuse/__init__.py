"""Graph fusions for tensor-parallel LLM inference under ``torch.compile``."""
