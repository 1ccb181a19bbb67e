"""What lipcore knows of a user's module: names, chains, outputs, and how to run it unnoticed."""
