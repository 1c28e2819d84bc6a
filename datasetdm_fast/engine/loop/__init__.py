"""The loop from requests to samples, and what decides how an image is made."""
