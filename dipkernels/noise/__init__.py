"""Which noise: the seed of a pass, the contexts that fix it, the guards against noise drawn
twice."""
