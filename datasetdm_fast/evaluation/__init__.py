"""How true labels are against ground truth, and what they are worth to a student."""
