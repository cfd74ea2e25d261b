"""A trainer in the shape of a real one, small enough to read: one file, one KL."""
