"""How a run runs: one loop for train-teacher and distill alike."""
