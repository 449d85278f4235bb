"""Above both towers: what is learnt about a model from a text, and stores changed by it."""
