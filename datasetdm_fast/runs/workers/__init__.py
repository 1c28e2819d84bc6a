"""Sharing one run among several processes."""
