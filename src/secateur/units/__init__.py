"""The values that join the steps, scores and masks, and selection from one to the other."""
