"""What went wrong in a step of a recorded run: what moved first, how it spread, samples, and what to check."""
