"""How rewards read answers: incrementally, anew, as embeddings, by entailment, by likelihood."""
