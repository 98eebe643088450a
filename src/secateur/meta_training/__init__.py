"""How pruners learn: the paper's signal and estimates for one, trials of masks for the other."""
