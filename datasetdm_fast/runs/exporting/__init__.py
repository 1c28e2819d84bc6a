"""Data sets in the layouts that trainers read: samples of run folders in, one format per file."""
