"""SAEs of other tools: upstream saev, SAELens, dictionary_learning, sparsify. See docs/checkpoints.md."""
