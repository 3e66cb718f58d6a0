"""How reward models read answers: incrementally or anew, as embeddings, by entailment, by likelihood."""
