"""The paper's own experiment at several scales: meta-train, score, prune, fine-tune, compare."""
