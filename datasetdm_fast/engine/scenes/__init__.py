"""The procedural worlds whose ground truth is known: scenes, their labels, and the tokenizer of their captions."""
