"""A durable, shared queue of requests, and what was made of them."""
