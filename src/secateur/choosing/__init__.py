"""From scores to the mask that is wanted: within a budget, and improved on texts."""
