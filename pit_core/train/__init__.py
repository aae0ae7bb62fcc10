"""Training: one loop, and one file per method that says what it optimises."""
