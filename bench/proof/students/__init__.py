"""Student networks: trained on real images, on generated ones or on both, and compared over seeds."""
