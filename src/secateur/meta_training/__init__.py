"""How pruners are taught: the paper's way, estimates, and trials of masks."""
