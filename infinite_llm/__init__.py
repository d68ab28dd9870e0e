"""Long-context LLM serving: one KV cache over many serving instances."""
